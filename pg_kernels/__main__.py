"""`python -m pg_kernels`, which is `pg-kernels`."""

import sys

from pg_kernels.model.cli import main

sys.exit(main())
