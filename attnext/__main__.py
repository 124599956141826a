"""``python -m attnext``: the same as the command ``attnext``."""

from attnext.cli import main

raise SystemExit(main())
