"""The command line: `jaxinterp transcoder --out runs/demo`, `jaxinterp sweep ...`, `jaxinterp preflight ...`."""
