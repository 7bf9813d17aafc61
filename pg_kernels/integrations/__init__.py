"""The kernels under other packages' code; each module needs the package that it is named after."""
