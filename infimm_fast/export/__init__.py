"""The exporters. Each lives in its own folder, `infimm_fast.export.<target>`; this facade re-exports them."""
