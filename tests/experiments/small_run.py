"""The flags of a run of seconds, and its text."""

SMALL = [
    "--model", "tiny", "--features", "64", "--k", "4", "--tokens", "12800", "--seq", "64", "--batch-size", "256",
    "--heldout-tokens", "4096", "--ce-tokens", "2048", "--pages", "4", "--save-every", "20",
]  # fmt: skip


def write_corpus(folder):
    """The folder, made where it is missing, with small text files."""
    folder.mkdir(exist_ok=True)
    for index in range(120):
        words = " ".join(f"the {index + n} quick brown foxes jump over {n * index} lazy dogs." for n in range(12))
        (folder / f"{index}.txt").write_text(words)
    return folder
