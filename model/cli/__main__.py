"""`python -m pg_kernels.model.cli`, which is `pg-kernels`."""

import sys

from . import main

sys.exit(main())
