"""`python -m omniserve` is the command `omniserve`."""

import sys

from omniserve.cli.main import main

sys.exit(main())
