"""The tests. A package, because some library installs one of that name."""
