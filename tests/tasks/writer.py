"""A writer wants a text that says less of one thing: find the feature, take it out of the model, read both texts."""

import dataclasses

from jaxinterp import find_features, generate, load, load_decomposition, replace, select
from jaxinterp.decompositions.stand_in import StandIn
from jaxinterp.evaluation.features.ablation import Without

subject, transcoder, leaf = load("tiny"), load_decomposition("transcoder"), "blocks/1/mlp"
story = "the cat sat on the mat. the cat ate the hat."
(feature, score), *_ = find_features(transcoder, subject, story, "cat")
stand_in = StandIn(select(subject.model, leaf).get(), transcoder, keep_error=True)
inside = dataclasses.replace(subject, model=replace(subject.model, {leaf: stand_in}))
own = generate(subject, story, max_tokens=8)
without = generate(inside, story, max_tokens=8, edits={f"{leaf}/codes": Without(feature)})
change = sum(without.log_probabilities[0]) - sum(own.log_probabilities[0])
print(f"feature {feature} ({score:.2f}): {own.text!r} becomes {without.text!r} ({change:+.3f} nats)")
