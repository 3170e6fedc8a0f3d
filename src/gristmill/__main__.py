"""`python -m gristmill` is the same as `gristmill`."""

from gristmill.cli import main

raise SystemExit(main())
