"""Write docs/families.md from the registry: `python -m tests.support.families_table > docs/families.md`.

What a family's experts are is read off the tiny model it builds; the notes come from the registry.
"""

import re

import transformers

from prescope.errors import UnsupportedOption
from prescope.hf import static_cache
from tests.support import families
from tests.support.families import FAMILIES, UNSUPPORTED

HEAD = """\
# Model families

Every package of transformers {version} whose experts go through `use_experts_implementation`. *Works* is what
`tests/hf/test_families.py` asserts on a tiny random model of the family: logits and generated tokens equal the
plain model's. {count} families. Written by `python -m tests.support.families_table > docs/families.md`; not by hand.

An experts module is by default a gated MLP, `down(act(gate(x)) * up(x))`, whose weights are stored (out, in)
with gate and up one after the other, without biases, and which reads the same tensor as its router. *Special*
says what differs:

- **bias**: gate, up and down have biases
- **no gate**: `down(act(up(x)))`
- **transposed**: weights are stored (in, out)
- **interleaved**: gate and up alternate, gate first
- **own gate**: clamps, scales or softcaps between up and down, through the module's `_apply_gate`
- **post norm**: each expert's output is normalised before it is weighted
- **top-1**: one expert a token

*Graph* says whether its decode steps can run from one CUDA graph, judged by the cache that transformers gives it:
*yes*, or the state that stands in the way; then they run layer by layer.
Decode steps and short prompts were run from graphs on an H200 (transformers 5.17, float32, the plain model's tokens:
`tests/engine/test_graph_families.py`) for the {on_gpu} of them that this version has.

| family | class tested | special | works | graph |
|---|---|---|---|---|"""


#: What stands in the way of a graph on a GPU besides the cache.
NOT_CAPTURED = {"phimoe": "makes its frequencies on the host"}
#: Families whose steps an H200 ran from graphs.
ON_GPU = 34


def special(name: str) -> str:
    """What an engine must know of the family's experts, beyond the default."""
    module = next(iter(families.experts_modules(families.build(name)).values()))
    words = {
        "no gate": not module.has_gate,
        "bias": module.has_bias,
        "transposed": module.is_transposed,
        "interleaved": not module.is_concatenated,
        "own gate": type(module)._apply_gate.__module__ == type(module).__module__,
        "post norm": getattr(module, "has_post_expert_norm", False),
        "top-1": FAMILIES[name].top_k == 1,
    }
    return "; ".join(
        [word for word, holds in words.items() if holds] + [FAMILIES[name].note] * bool(FAMILIES[name].note)
    )


def graph(name: str) -> str:
    """Whether decode steps can be captured, as far as the cache says."""
    if not FAMILIES[name].generates:
        return ""
    try:
        static_cache(families.build(name), 1, 1)
    except UnsupportedOption as error:
        words = re.findall(r"\w+(?:Layer|attention)\b", str(error))
        return "no: " + (", ".join(words) or "a cache of its own")
    return f"no: {NOT_CAPTURED[name]}" if name in NOT_CAPTURED else "yes"


def table() -> str:
    """The whole page."""
    rows = {
        name: f"| `{name}` | `{f.model}` | {special(name)} | "
        f"{'yes' if f.generates else 'forward only'} | {graph(name)} |"
        for name, f in FAMILIES.items()
    }
    rows |= {
        name: f"| `{name}` | | not in transformers {transformers.__version__} | not tested | |"
        for name in families.missing()
    }
    rows |= {name: f"| `{name}` | | | no: {reason} | |" for name, reason in UNSUPPORTED.items()}
    head = HEAD.format(version=transformers.__version__, count=len(FAMILIES), on_gpu=ON_GPU)
    return "\n".join([head, *(rows[name] for name in sorted(rows))])


if __name__ == "__main__":
    print(table())
