"""A forward pass in plain NumPy whose parts can be held at another run: derivatives by finite differences.

It shares nothing with the package but the weights. A held norm keeps the scale of the first run; a held activation is
the line through the origin and that run's point; a held gate is half of the product rule around it; a held pattern is
that run's. So its slopes are the coefficients of AtP (nothing held) and RelP (norm, activation, gate), and what is
added to one reader alone gives the scores of edges.
"""

import math

import numpy as np


def array(leaf):
    return np.asarray(leaf, np.float64)


def linear(module, x):
    return x @ array(module.weight) + (0 if module.bias is None else array(module.bias))


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


class ByHand:
    """The model on one prompt."""

    def __init__(self, model, tokens, held=()):
        self.model, self.tokens, self.held = model, np.asarray(tokens), held
        self.base = {}  # what is held, by name
        self.arrays = {}
        self(record=True)

    def norm(self, module, x, name, record):
        centred = x - x.mean(-1, keepdims=True) if module.kind == "layer" else x
        scale = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + module.epsilon)
        scale = self.keep(name, scale, record, "norm")
        y = centred * scale * (array(module.weight) + module.offset)
        return y if module.bias is None else y + array(module.bias)

    def keep(self, name, value, record, rule):
        if record:
            self.base[name] = value
        return self.base[name] if rule in self.held else value

    def rotate(self, x, attention):
        half = attention.rotary_dimensions // 2
        y = x.copy()
        places = np.arange(len(x))[:, None, None]
        angle = places * attention.rotary_base ** (-2 * np.arange(half) / attention.rotary_dimensions)
        a, b = x[..., :half], x[..., half : 2 * half]
        y[..., :half], y[..., half : 2 * half] = (
            a * np.cos(angle) - b * np.sin(angle),
            b * np.cos(angle) + a * np.sin(angle),
        )
        return y

    def attention(self, layer, x, record):
        own, seq = self.model.blocks[layer].attn, len(x)
        q, k, v = (linear(each, x).reshape(seq, -1, array(own.v_proj.weight).shape[1] // own.kv_heads)
                   for each in (own.q_proj, own.k_proj, own.v_proj))  # fmt: skip
        if own.rotary_dimensions:
            q, k = self.rotate(q, own), self.rotate(k, own)
        k, v = (np.repeat(each, own.heads // own.kv_heads, axis=1) for each in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) * own.scale
        scores = np.where(np.tri(seq, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        pattern = self.keep(f"pattern{layer}", weights / weights.sum(-1, keepdims=True), record, "attention")
        return np.einsum("hqk,khd->qhd", pattern, v)

    def mlp(self, layer, x, record):
        own = self.model.blocks[layer].mlp
        pre = linear(own.up_proj if own.gate_proj is None else own.gate_proj, x)
        curve = gelu if own.activation == "gelu" else lambda x: x / (1 + np.exp(-x))
        before = self.keep(f"pre{layer}", pre, record, "activation")
        active = curve(before) / before * pre if "activation" in self.held else curve(pre)
        if own.gate_proj is None:
            return active
        up = linear(own.up_proj, x)
        if record:
            self.base[f"gate{layer}"] = active, up
        if "gate" not in self.held:
            return active * up
        a, b = self.base[f"gate{layer}"]
        return a * b + 0.5 * (b * (active - a) + a * (up - b))

    def __call__(self, added=None, read=None, edit=None, record=False):
        """Logits of the last position.

        Args:
          added: by array name, what is added to the array;  read: by reader (`blocks/1/mlp`, `final`), what it alone
            reads besides;  edit: by array name, a function.
        """
        added, read, edit = added or {}, read or {}, edit or {}

        def tap(name, value):
            value = edit[name](value) if name in edit else value
            value = value + added.get(name, 0)
            if record:
                self.arrays[name] = value
            return value

        model = self.model
        x = array(model.embedding.token)[self.tokens] * model.embedding.scale
        if model.embedding.position is not None:
            x = x + array(model.embedding.position)[: len(x)]
        x = tap("embed", x)
        for layer, block in enumerate(model.blocks):
            name = f"blocks/{layer}"
            inside = self.norm(block.attn_norm, x + read.get(f"{name}/attn", 0), f"{name}/a", record)
            z = tap(f"{name}/attn/z", self.attention(layer, inside, record))
            out = tap(f"{name}/attn/out", linear(block.attn.o_proj, z.reshape(len(x), -1)))
            x = x + block.residual_scale * out
            inside = self.norm(block.mlp_norm, x + read.get(f"{name}/mlp", 0), f"{name}/m", record)
            hidden = tap(f"{name}/mlp/hidden", self.mlp(layer, inside, record))
            out = tap(f"{name}/mlp/out", linear(block.mlp.down_proj, hidden))
            x = tap(f"{name}/resid/post", x + block.residual_scale * out)
        final = self.norm(model.final_norm, x + read.get("final", 0), "end", record)
        return (final @ array(model.output_matrix()))[-1]

    def slope(self, metric, direction, place, step=1e-5):
        """The derivative of metric(logits) along `direction`: {name: array} for the argument `place` of a call."""
        ends = [
            metric(self(**{place: {name: sign * step * each for name, each in direction.items()}})) for sign in (1, -1)
        ]
        return (ends[0] - ends[1]) / (2 * step)
