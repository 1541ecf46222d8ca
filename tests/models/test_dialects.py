"""Names in four dialects: the page is the table, and every row names what it says in a model of its family."""

import json
from pathlib import Path

import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.models.dialects import names_of, page, understood
from jaxinterp.models.families.configs import ANYWHERE, family_config, family_of
from jaxinterp.models.families.tables import FAMILIES
from jaxinterp.models.families.wrappers import text_fields
from jaxinterp.models.files.weights import skeleton
from jaxinterp.models.sites import check_site, sites
from jaxinterp.training.fit import expand

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "parity" / "goldens"


def fields_of(name: str) -> dict[str, object]:
    return dict(text_fields(json.loads((GOLDENS / name / "config.json").read_text()), ANYWHERE))


GOLDEN_OF = {str(fields_of(path.name)["model_type"]): path.name for path in sorted(GOLDENS.iterdir(), reverse=True)}


def model_of(name: str) -> object:
    fields = fields_of(name)
    return skeleton(family_config(family_of(fields), fields))


def test_the_page_is_the_table() -> None:
    assert (ROOT / "docs" / "names.md").read_text() == page()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_name_of_every_family_is_understood(family: str) -> None:
    """Where the model has the array; a name that two families use differently is refused with both meanings."""
    model = model_of(GOLDEN_OF[family])
    known = sites(model)
    rows = names_of(FAMILIES[family])
    layer = next(index for index in range(9) if f"blocks/{index}/mlp" in known)
    understood_rows = 0
    for ours, *others in rows:
        mine = ours.replace("*", str(layer))
        if mine not in known:
            continue
        for other in filter(None, others):
            theirs = other.replace("*", str(layer))
            try:
                found = understood(model, theirs, known)
            except UserError as error:
                assert repr(mine) in str(error) and "by family: say which" in str(error)
            else:
                assert found == mine, (theirs, found, mine)
                understood_rows += 1
    assert understood_rows > 15
    for dialect in range(4):
        names = [row[dialect] for row in rows if row[dialect]]
        assert len(names) == len(set(names))


def test_names_as_sites() -> None:
    llama, gemma = model_of("llama"), model_of("gemma2")
    assert expand(llama, "blocks.1.hook_mlp_out") == "blocks/1/mlp/out"
    assert expand(llama, "resid_post.0") == "blocks/0/resid/post"
    assert expand(llama, "model.layers.1.mlp") == "blocks/1/mlp"
    assert expand(llama, "blocks.*.hook_resid_post") == ("blocks/0/resid/post", "blocks/1/resid/post")
    assert check_site(model_of("gpt2"), "transformer.h.1.mlp.c_proj") == "blocks/1/mlp/down_proj"
    assert check_site(model_of("qwen3-moe"), "expert_weights.1") == "blocks/1/mlp/experts/weight"
    assert check_site(gemma, "blocks.1.hook_mlp_out") == "blocks/1/mlp/added"
    assert check_site(gemma, "mlp_out.1") == "blocks/1/mlp/out"
    with pytest.raises(UserError, match=r"'blocks.1.hook_attn_out' lies behind the norm"):
        check_site(gemma, "blocks.1.hook_attn_out")
    with pytest.raises(UserError, match=r"no site 'blocks.1.hook_mlp_outt'.*Did you mean 'blocks/1/mlp/out'"):
        check_site(llama, "blocks.1.hook_mlp_outt")
    with pytest.raises(UserError, match=r"no site 'blocks.7.hook_mlp_out'"):
        check_site(llama, "blocks.7.hook_mlp_out")
