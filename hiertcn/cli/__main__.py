"""``python -m hiertcn.cli``: the ``hiertcn`` command."""

from hiertcn.cli import main

main()
