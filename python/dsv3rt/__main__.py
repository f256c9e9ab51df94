"""`python -m dsv3rt` is the command `dsv3rt`."""

import sys

from dsv3rt.cli import main

sys.exit(main())
