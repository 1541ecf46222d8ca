"""Look at a dictionary in a browser: an index on disk, answers read from it, a server on this machine, an export.

build.py      reads a text once and writes the index beside the run: resumable, never done twice
index.py      the index: arrays of fixed rows, mapped from disk, so that nothing is read before it is asked for
answers.py    what the pages show, as plain JSON, read from the index alone: lists, search, one feature
live.py       what needs the model: your own text, steering, ablation
labels.py     what you call a feature, in labels.json beside the run
compare.py    the nearest feature of another dictionary
server.py     all that over HTTP on the loopback address;   guard.py   who may ask
export.py     the same pages as files, without a server
"""
