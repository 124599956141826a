"""``python -m attnext``: the same as the command ``attnext``."""

from attnext_command import main

raise SystemExit(main())
