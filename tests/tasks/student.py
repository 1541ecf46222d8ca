"""A student trained a transcoder this evening: which feature fires on "e", and what is the loss without it?"""

from jaxinterp import ablation_effect, find_features, fit, load, load_text, top_contexts
from jaxinterp.methods import Transcoder

subject = load("tiny")
train, heldout = load_text("docs", subject.tokenizer, seq=64, max_tokens=40_000)
trained = fit(
    Transcoder(features=128, k=8), subject, train, site="blocks/1/mlp", steps=20, batch_size=512
).decomposition
(feature, score), *_ = find_features(trained, subject, heldout, "e", tokens=4096)
print(*top_contexts(trained, subject, heldout, [feature], tokens=4096)[feature], sep="\n")
effect = ablation_effect(trained, subject.model, subject.tokens("here we see the east end"), feature)
print(f"feature {feature} (score {score:.2f}): without it the loss changes by {effect.mean():+.5f} nats a token")
