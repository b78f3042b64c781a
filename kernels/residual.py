"""
x + f(x) inside the matrix product that ends f: a pass over the graphs that torch.compile makes for a GPU. model.py adds
as one reads it; in the graph a product of fused.py whose result is only added to something becomes `product_sum`, which
reads that something where it would have written, and saves a kernel that reads three such tensors and writes one.
"""

import functools

import torch

from kernels import fused

ADD, VIEWS = torch.ops.aten.add.Tensor, (torch.ops.aten.view.default, torch.ops.aten.reshape.default)


@functools.cache
def graph_pass():
    """For torch._inductor.config.post_grad_custom_post_pass; made late, since it imports the compiler."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class SumsIntoProducts(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph):
            sums_into_products(graph)

        def uuid(self):
            return get_hash_for_files((__file__,))

    return SumsIntoProducts()


def sums_into_products(graph: torch.fx.Graph):
    for node in graph.find_nodes(op="call_function", target=ADD):
        for term, view in (node.args, node.args[::-1]):
            if is_sum(node, term, view):
                product = view.args[0]
                layout, left, right, _ = product.args
                with graph.inserting_before(node):
                    flat = graph.call_function(VIEWS[1], (term, product.meta["val"].shape))
                    total = graph.call_function(fused.product_sum, (flat, layout, left, right))
                    result = graph.call_function(VIEWS[1], (total, node.meta["val"].shape))
                flat.meta["val"] = total.meta["val"] = product.meta["val"]
                result.meta |= node.meta
                node.replace_all_uses_with(result)
                for old in node, view, product:
                    graph.erase_node(old)
                break


def is_sum(node, term, view) -> bool:
    """Whether `view` is a view of a product, neither of which anything but `node` reads, and `term` is of its shape."""
    if not (isinstance(term, torch.fx.Node) and isinstance(view, torch.fx.Node)) or node.kwargs or term is view:
        return False
    if view.target not in VIEWS or len(view.users) > 1:
        return False
    product = view.args[0]
    if product.target is not fused.product or len(product.users) > 1:
        return False
    shape = node.meta["val"].shape
    return all(one.meta["val"].shape == shape and one.meta["val"].dtype == fused.DTYPE for one in (node, term, view))
