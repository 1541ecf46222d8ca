"""Documents from files, corpora and packages."""
