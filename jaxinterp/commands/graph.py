"""From a prompt to an attribution graph that opens in a browser; trains the transcoders that it needs.

Papers: circuit tracing (Ameisen et al. 2025; recalled), transcoder circuits (Dunefsky, Chlenski, Nanda 2024, arXiv
2406.11944), skip transcoders (Paulo, Shabalin, Belrose 2025, arXiv 2501.18823).

Command: jaxinterp graph --prompt "the end of the" --out runs/graph       (the shipped 4 x 128 model)
         jaxinterp graph --model smollm2-135m --prompt "The capital of France is" --out runs/capital
         jaxinterp graph --prompt "the end of the" --preflight            (what memory it takes; nothing is trained)

A transcoder for every MLP is trained once and kept in OUT/transcoders (or in --transcoders, for many prompts); a run
that was stopped goes on with --resume. Written: graph.json (opens in circuit-tracer's frontend and Neuronpedia),
features/ for circuit-tracer's local server, checks.json (what the graph predicts of interventions against what they
do), graph.html.

Expected on the 4 x 128 model: under five minutes on two cores from nothing, seconds once there are transcoders.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxinterp.causal.graphs.build import choose_targets, graph_of
from jaxinterp.causal.graphs.capture import capture, prompt_tokens, subject_of
from jaxinterp.causal.graphs.check import check_interventions
from jaxinterp.causal.graphs.contexts import About, about_features
from jaxinterp.causal.graphs.frontend import write_feature_files
from jaxinterp.causal.graphs.graph import Graph
from jaxinterp.causal.graphs.influence import completeness_score, replacement_score
from jaxinterp.causal.graphs.prune import Pruned, prune
from jaxinterp.causal.graphs.schema import graph_json, write_graph_json
from jaxinterp.causal.graphs.transcoders import Transcoders, transcoders_of
from jaxinterp.commands.shell import check_positive, say, settings_of
from jaxinterp.core.errors import UserError
from jaxinterp.data.text.load_text import load_text, take
from jaxinterp.decompositions.cross_layer import CrossLayer
from jaxinterp.decompositions.cross_layer_files import load_cross_layer, save_cross_layer
from jaxinterp.decompositions.files import load_dictionary, save_dictionary
from jaxinterp.methods import SkipTranscoder, Transcoder
from jaxinterp.methods.combine.per_layer_transcoders import PerLayerTranscoders
from jaxinterp.methods.sparse.cross_layer_transcoder import CrossLayerTranscoder
from jaxinterp.models.load import Subject
from jaxinterp.models.sites import sites
from jaxinterp.models.transformer import Transformer
from jaxinterp.preflight.graphs import graph_memory, transcoder_shapes
from jaxinterp.report.graph import write_graph_page
from jaxinterp.training.fit import fit
from jaxinterp.training.tracking import JsonLines


@dataclass(frozen=True)
class Config:
    """One prompt, one model, transcoders of all its MLPs."""

    out: Path = Path("runs/graph")
    """Folder for the results."""
    prompt: str = "the end of the"
    """The text whose next token is explained."""
    model: str = "bilinear-4x128"
    """bilinear-4x128, smollm2-135m, tiny, a Hugging Face directory, a .gguf file, or a saved model."""
    transcoders: Path | None = None
    """Folder of trained transcoders; trained there where it is absent. Default: OUT/transcoders."""
    kind: Literal["skip", "transcoder", "cross_layer"] = "skip"
    """What is trained: per layer with a linear path, per layer without, or cross-layer."""
    features: int = 1024
    """Features a layer."""
    k: int = 16
    """Active features per token and layer."""
    text: str = "docs"
    """Training text: docs, kjv, shakespeare, several joined by +, or a path."""
    tokens: int = 200_000
    """Training tokens."""
    seq: int = 256
    """Length of a window of text, in tokens."""
    batch_size: int = 2048
    """Tokens a training step."""
    learning_rate: float = 2e-3
    """Peak learning rate of Adam."""
    context_tokens: int = 65_536
    """Held-out tokens that are searched for what features fire on."""
    node_threshold: float = 0.8
    """Nodes are kept until they make up this share of the influence."""
    edge_threshold: float = 0.98
    """Links likewise."""
    max_features: int | None = None
    """How many features are nodes before pruning; None: all that are active."""
    checked: int = 12
    """Features whose removal is compared with the graph's prediction."""
    seed: int = 0
    """Of the data order and the start values."""
    resume: bool = False
    """Continue a training that was stopped."""
    preflight: bool = False
    """Only say what memory the graph takes at most; train and write nothing."""

    @property
    def folder(self) -> Path:
        """Where the transcoders are."""
        return self.out / "transcoders" if self.transcoders is None else self.transcoders


def method_of(config: Config) -> Any:
    """What is trained at all MLPs."""
    common: dict[str, Any] = {
        "features": config.features,
        "k": config.k,
        "activation": "topk",
        "learning_rate": config.learning_rate,
        "dead_after": 200_000,
    }
    if config.kind == "cross_layer":
        return CrossLayerTranscoder(sparsity=0.0, **common)
    return PerLayerTranscoders((SkipTranscoder if config.kind == "skip" else Transcoder)(**common))


TRAINED = "trained.json"
"""Written last: a folder without it was not finished."""


def trained(config: Config, subject: Subject, train: Any) -> Transcoders:
    """Transcoders of all MLPs: loaded where they are, else trained with checkpoints."""
    folder, wanted = config.folder, settings_of(config, *NOT_TRAINING)
    if (folder / TRAINED).exists():
        known = json.loads((folder / TRAINED).read_text())
        if known["model"] != config.model:
            raise UserError(f"{folder} holds transcoders of {known['model']}, not of {config.model}: choose another.")
        say(f"transcoders: {folder} ({known['kind']}, {known['features']} features a layer)")
        return transcoders_of(_load(folder, known["kind"]))
    steps = config.tokens // config.batch_size
    say(f"training transcoders of {len(sites(subject.model, 'blocks/*/mlp'))} MLPs, {config.tokens:,} tokens")
    checkpoints = folder / "checkpoints"
    found = fit(
        method_of(config), subject, train, site="blocks/*/mlp", steps=steps, batch_size=config.batch_size,
        seed=config.seed, checkpoint=checkpoints, save_every=max(10, steps // 40 * 10), resume=config.resume,
        track=(JsonLines(folder / "log.jsonl", resume=config.resume),),
    )  # fmt: skip
    decomposition = found.decomposition
    if isinstance(decomposition, CrossLayer):
        save_cross_layer(decomposition, folder / "cross_layer")
    else:
        for number, part in enumerate(decomposition.parts):
            save_dictionary(part, folder / f"layer_{number}")
    (folder / TRAINED).write_text(json.dumps(wanted, indent=2) + "\n")
    return transcoders_of(decomposition)


NOT_TRAINING = (
    "prompt", "transcoders", "context_tokens", "node_threshold", "edge_threshold", "max_features", "checked",
    "preflight",
)  # fmt: skip


def _load(folder: Path, kind: str) -> Any:
    if kind == "cross_layer":
        return load_cross_layer(folder / "cross_layer")
    parts = sorted(folder.glob("layer_*"), key=lambda path: int(path.name.removeprefix("layer_")))
    return [load_dictionary(part) for part in parts]


def main(config: Config) -> None:
    """Train or load, explain, check, write."""
    check_positive(config, "tokens", "features", "k", "seq", "context_tokens")
    if config.out.is_file():
        raise UserError(f"out={config.out} is a file: choose a folder.")
    started = time.perf_counter()
    subject = subject_of(config.model)
    if subject.tokenizer is None:
        raise UserError(f"model {config.model} came without a tokenizer: give its folder a tokenizer.json.")
    if config.preflight:
        say(*memory_lines(config, subject))
        return
    enough = 2 * (config.tokens + 10 * config.context_tokens)
    train, heldout = load_text(config.text, subject.tokenizer, seq=config.seq, max_tokens=enough)
    transcoders = trained(config, subject, train)
    ready = time.perf_counter()

    captured = capture(subject, config.prompt, transcoders)
    graph = graph_of(captured, choose_targets(captured), max_features=config.max_features)
    kept = prune(graph, node_threshold=config.node_threshold, edge_threshold=config.edge_threshold)
    checks = check_interventions(captured, graph, kept, most=config.checked)
    chosen = sorted({(int(layer), int(index)) for layer, _, index in graph.features[kept.nodes[: len(graph.features)]]})
    batches = take(heldout, config.context_tokens, seed=config.seed)
    rows = [
        {name: np.asarray(batch[name])[row] for name in ("tokens", "weight")}
        for batch in batches
        for row in range(len(batch["tokens"]))
    ]
    about = about_features(captured.model, transcoders, chosen, rows)
    write(config, subject, graph, kept, about, checks)
    report(config, subject, graph, kept, checks)
    done = time.perf_counter()
    say(
        f"{ready - started:.0f} s for transcoders, {done - ready:.0f} s for the graph.", f"Open {config.out}/graph.html"
    )


def memory_lines(config: Config, subject: Subject) -> list[str]:
    """What the graph of this prompt takes at most."""
    model = subject_of(subject).model
    assert isinstance(model, Transformer)
    seq = len(prompt_tokens(subject, config.prompt))
    shapes = transcoder_shapes(
        model, config.features, k=config.k, skip=config.kind == "skip", cross_layer=config.kind == "cross_layer"
    )
    return graph_memory(model, shapes, seq, max_features=config.max_features).lines()


def write(
    config: Config,
    subject: Subject,
    graph: Graph,
    kept: Pruned,
    about: dict[tuple[int, int], About],
    checks: dict[str, Any],
) -> None:
    """graph.json, features/, checks.json and graph.html."""
    assert subject.tokenizer is not None
    text = subject.tokenizer.token_text
    scan = f"{subject.name}-{config.kind}-{config.features}"
    document = graph_json(
        graph,
        kept,
        slug="graph",
        scan=scan,
        prompt=config.prompt,
        token_text=text,
        labels={place: own.label(text) for place, own in about.items()},
        node_threshold=config.node_threshold,
    )
    write_graph_json(document, config.out / "graph.json")
    write_feature_files(about, config.out / "features" / scan, text)
    (config.out / "checks.json").write_text(json.dumps(checks, indent=2) + "\n")
    facts = {name: str(value) for name, value in settings_of(config).items()}
    facts |= {name: f"{value:.3g}" for name, value in checks.items() if isinstance(value, float)}
    write_graph_page(graph, kept, document, config.out / "graph.html", token_text=text, about=about, facts=facts)


def report(config: Config, subject: Subject, graph: Graph, kept: Pruned, checks: dict[str, Any]) -> None:
    """What came out, in a few lines."""
    assert subject.tokenizer is not None
    best = ", ".join(
        f"{subject.tokenizer.token_text(int(id))!r} {weight:.2f}"
        for id, weight in zip(graph.target_tokens, graph.weight, strict=True)
    )
    say(
        f"next token: {best}",
        f"{len(graph.features)} active features; kept: {int(kept.nodes[: len(graph.features)].sum())} features, "
        f"{int(kept.nodes[graph.errors].sum())} errors, {int(kept.edges.sum())} links",
        f"replacement score {replacement_score(graph):.2f}, completeness {completeness_score(graph):.2f}; sum rule "
        f"missed by {np.abs(graph.sum_rule()).max():.1e} of {np.abs(graph.value).max():.1f}",
        f"removing {checks['features']} features one by one: direct mode predicted to {checks['direct_missed']:.1e}; "
        f"correlation of predicted and measured change of the first logit: frozen {checks['frozen_correlation']:.2f}, "
        f"free {checks['free_correlation']:.2f}",
    )
