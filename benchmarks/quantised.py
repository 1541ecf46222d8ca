"""Memory and time of loading a quantised file: peak of the process over the size of the dequantised model.

    python -m benchmarks.quantised --megabytes 1000 --kind Q8_0     a GGUF file of random blocks, written and loaded

The bound: the dequantised model, one leaf of it, and about 25 times `weights.AT_ONCE` numbers.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np

from jaxinterp.models.load import load

D_MODEL, D_MLP, VOCAB, HEADS = 1024, 4096, 32_000, 16


def write_random(path: Path, kind: str, megabytes: float) -> int:
    """A Llama file of about that size with random blocks; how many numbers it holds."""
    quantisation = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quantisation]
    a_layer = 4 * D_MODEL**2 + 3 * D_MODEL * D_MLP
    layers = max(1, round((megabytes * 1e6 * block / size - VOCAB * D_MODEL) / a_layer))
    writer, rng, numbers = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0), 0
    writer.add_block_count(layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(D_MODEL)
    writer.add_feed_forward_length(D_MLP)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    matrices = {"token_embd": (VOCAB, D_MODEL)}
    for layer in range(layers):
        matrices |= {f"blk.{layer}.attn_{name}": (D_MODEL, D_MODEL) for name in ("q", "k", "v", "output")}
        matrices |= {f"blk.{layer}.ffn_{name}": (D_MLP, D_MODEL) for name in ("gate", "up")}
        matrices |= {f"blk.{layer}.ffn_down": (D_MODEL, D_MLP)}
    random = rng.integers(0, 256, D_MLP * D_MLP // block * size, dtype=np.uint8)
    for name, (rows, columns) in matrices.items():
        row = columns // block * size
        writer.add_tensor(f"{name}.weight", np.resize(random, (rows, row)), raw_dtype=quantisation)
        numbers += rows * columns
    for name in ["output_norm", *(f"blk.{n}.{part}_norm" for n in range(layers) for part in ("attn", "ffn"))]:
        writer.add_tensor(f"{name}.weight", np.ones(D_MODEL, np.float32))
        numbers += D_MODEL
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return numbers


def main() -> None:
    """Write, load, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=1000)
    parser.add_argument("--kind", default="Q8_0")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--file", type=Path, help="an existing file: only load it (the writer's memory is not counted)")
    parser.add_argument("--write", type=Path, help="only write the file")
    arguments = parser.parse_args()
    if arguments.write:
        print(write_random(arguments.write, arguments.kind, arguments.megabytes))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.file or Path(folder) / "random.gguf"
        if arguments.file is None:
            write_random(path, arguments.kind, arguments.megabytes)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        began = time.process_time()
        subject = load(path, dtype=arguments.dtype)
        seconds = time.process_time() - began
        import jax  # after load: what is counted is the leaves

        held = sum(leaf.nbytes for leaf in jax.tree.leaves(subject.model))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        mapped = path.stat().st_size
        report = {
            "file_megabytes": round(mapped / 1e6),
            "dequantised_megabytes": round(held / 1e6),
            "peak_megabytes": round(peak / 1e6),
            "before_megabytes": round(before / 1e6),
            "peak_over_dequantised": round(peak / held, 3),
            "cpu_seconds": round(seconds, 1),
        }
        print(json.dumps(report))


if __name__ == "__main__":
    main()
