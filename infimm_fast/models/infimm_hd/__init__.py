"""InfiMM-HD and its relatives: InfiMM pretrain, InfiMM-Zephyr, OpenFlamingo."""
