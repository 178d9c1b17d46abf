"""The compiler: types, the pass infrastructure, the pipeline and the command line."""
