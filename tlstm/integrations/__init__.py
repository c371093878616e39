"""Bridges to other libraries, each imported by its own name, because each needs a package that tlstm does not."""
