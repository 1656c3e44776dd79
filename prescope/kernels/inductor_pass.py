"""What compiled decoder layers do otherwise than Inductor would: linears of few tokens and the router's top-k.

Inductor leaves both to libraries, whose kernels are made for more. The pass sees the graph that Inductor is about to
compile, so it serves every family.
"""

from collections import defaultdict
from operator import getitem
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from . import skinny_linear, topk

aten = torch.ops.aten
VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}


class FewTokens(CustomGraphPass):
    """Replaces products of a few tokens with weights, and top-k of few columns, by kernels of our own."""

    def __call__(self, graph: Graph) -> None:
        places = {node: i for i, node in enumerate(graph.nodes)}
        together: dict[tuple[Node, tuple[int, ...]], list[Node]] = defaultdict(list)
        for node in graph.find_nodes(op="call_function", target=aten.mm.default):
            if _weight(node) is not None:
                together[_same(node.args[0])].append(node)
        for nodes in together.values():
            nodes.sort(key=places.__getitem__)
            for i in range(0, len(nodes), skinny_linear.MOST_WEIGHTS):
                _join(graph, nodes[i : i + skinny_linear.MOST_WEIGHTS], places)
        for node in graph.find_nodes(op="call_function", target=aten.topk.default):
            if _is_small(node):
                with graph.inserting_before(node):
                    ours = graph.call_function(torch.ops.prescope.topk.default, (node.args[0], node.args[1]))
                ours.meta.update(node.meta)
                node.replace_all_uses_with(ours)
                graph.erase_node(node)

    def uuid(self) -> Any:
        """Changes with the code, since compiled graphs are kept on disk."""
        return get_hash_for_files((__file__, skinny_linear.__file__, topk.__file__))


def _weight(node: Node) -> Node | None:
    """The weight (N, I) that few tokens are multiplied with, if that is what a product is, and it is there before."""
    x, right = node.args
    if not isinstance(x, Node) or not isinstance(right, Node) or right.op != "call_function":
        return None
    is_transposed = right.target is aten.permute.default and right.args[1] == [1, 0]
    if not is_transposed and right.target is not aten.t.default:
        return None
    weight = right.args[0]
    if not isinstance(weight, Node) or weight.op != "placeholder":
        return None
    x_meta, w_meta = x.meta["val"], weight.meta["val"]
    fits = (
        isinstance(x_meta.shape[0], int)
        and x_meta.shape[0] <= skinny_linear.MOST_TOKENS
        and x_meta.dtype == w_meta.dtype
        and x_meta.dtype in skinny_linear.DTYPES
        and w_meta.is_contiguous()
    )
    return weight if fits else None


def _same(x: Node) -> tuple[Node, tuple[int, ...]]:
    """Equal for inputs of the same values: each linear has a view of its own of what it is given."""
    shape = tuple(x.meta["val"].shape)
    while x.op == "call_function" and x.target in VIEWS:
        x = x.args[0]  # type: ignore[assignment]
    return x, shape


def _join(graph: Graph, nodes: list[Node], places: dict[Node, int]) -> None:
    """One launch for products of one input."""
    first = min(nodes, key=places.__getitem__)
    weights = [_weight(node) for node in nodes]
    metas = [node.meta["val"] for node in nodes]
    with graph.inserting_before(first):
        ours = graph.call_function(torch.ops.prescope.skinny_linear.default, (nodes[0].args[0], weights))
        ours.meta["val"] = metas
        parts = [graph.call_function(getitem, (ours, i)) for i in range(len(nodes))]
    for node, part in zip(nodes, parts, strict=True):
        part.meta.update(node.meta)
        node.replace_all_uses_with(part)
        graph.erase_node(node)


def _is_small(node: Node) -> bool:
    """Whether a top-k is one of a router."""
    arguments = [*node.args, *(-1, True, True)[len(node.args) - 2 :]]
    x, k, dim, largest = arguments[:4]
    if not isinstance(x, Node) or not isinstance(k, int) or node.kwargs:
        return False
    meta = x.meta["val"]
    return (
        meta.dim() == 2
        and dim in (-1, 1)
        and largest is True
        and all(isinstance(size, int) for size in meta.shape)
        and meta.shape[0] <= topk.MOST_ROWS
        and k <= meta.shape[1] <= topk.MOST_COLUMNS
        and k <= topk.MOST_CHOSEN
        and meta.dtype in topk.DTYPES
    )
