"""An auditor was given a dictionary of a residual stream: which feature does a prompt use most, and for what?"""

from jaxinterp import codes_table, load, load_decomposition, logits_of, run
from jaxinterp.decompositions.offered import Through
from jaxinterp.evaluation.features.ablation import Without

subject, sae, prompt = load("tiny"), load_decomposition("dictionary"), "open the door"
tokens, site, inside = subject.tokens(prompt), sae.sites.reads, {sae.sites.reads: Through(sae, keep_error=True)}
table = codes_table(sae.encode(run(subject.model, tokens)[site]), tokens, subject)
feature = int(table["feature"][table["value"].argmax()])
without = run(subject.model, tokens, edits=inside | {f"{site}/codes": Without(feature)}).logits[0, -1]
change = without - run(subject.model, tokens).logits[0, -1]
word, (raised, _) = subject.tokenizer.token_text(int(change.argmin())), logits_of(sae, subject, feature, count=3)
print(f"feature {feature} raises {raised}; without it the logit of {word!r} changes by {change.min():+.3f}")
