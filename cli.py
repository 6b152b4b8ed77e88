"""Launcher of a checkout: ``python cli.py pretrain ...``. The installed command is ``rwkv-train``."""

from rwkv_train.commands import main

if __name__ == "__main__":
    main()
