"""What every op shares: argument checks and their typed errors."""
