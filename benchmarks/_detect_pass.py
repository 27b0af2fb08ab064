"""What one library finds on models of torchvision, for `benchmarks.detect`.

Run by `benchmarks.detect` with a Python that can import that library; it prints a line of JSON for
each model. Weights are drawn anew for each model, statistics of BatchNorm as of a trained network.
The change of the outputs is measured in float64, from the network that the library prepared
(BatchNorm folded) to the equalized one.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import networkx as nx
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import enorm_fx
from benchmarks.zoo import SOUND, draw_statistics, examine
from benchmarks.zoo_torchvision import build
from enorm_fx.verifying import relative_change

AS_RELU = " (ReLU6 as ReLU)"  # ends the name of a model whose ReLU6 modules are replaced first
PATIENCE = 300  # seconds for one model, then it is an error

Found = dict[str, Any]
Regions = Sequence[Sequence[Mapping[tuple[str, str, int], int]]]


def ours(model: nn.Module, inputs: Any) -> Found:
    """Groups with `batchnorm="affine"`; the change is `verify`'s under a random rescaling."""
    begin = time.process_time()
    enorm_fx.analyze(model, inputs, batchnorm="affine")
    seconds = time.process_time() - begin
    row = examine("", model, inputs)
    if row.error:
        raise RuntimeError(row.error)
    return {
        "regions": row.groups,
        "channels": row.scales,
        "independent": row.scales,
        "seconds": seconds,
        "change": row.change,
    }


def brevitas(model: nn.Module, inputs: Any) -> Found:
    """Regions that `EqualizeGraph` equalizes, after the library's own preparation of the graph.

    Those with a layer whose axis it does not know (grouped convolutions) are left out: it skips
    them.
    """
    from brevitas.fx import symbolic_trace
    from brevitas.graph.equalize import EqualizeGraph
    from brevitas.graph.quantize import preprocess_for_quantize

    begin = time.process_time()
    try:
        graph = symbolic_trace(model)
    except ValueError:  # its TraceError; torch's own tracer knows which functions not to enter
        graph = torch.fx.symbolic_trace(model)
    graph = preprocess_for_quantize(graph, trace_model=False, equalize_iters=0, relu6_to_relu=False)
    _, found = EqualizeGraph(iterations=0, return_regions=True).apply(graph)
    seconds = time.process_time() - begin
    usable = [
        region
        for region in found
        if all(m.weight_axis is not None for m in (*region.srcs.values(), *region.sinks.values()))
    ]
    graph.double()
    before = outputs(graph, inputs)
    EqualizeGraph(iterations=1, threshold=0.0).apply(graph)
    return {
        "regions": len(usable),
        "channels": sum(region.max_shape_srcs for region in usable),
        "independent": independent([_touched(region) for region in usable]),
        "seconds": seconds,
        "change": relative_change(before, outputs(graph, inputs)),
    }


def _touched(region: Any) -> list[dict[tuple[str, str, int], int]]:
    """For each channel of a region of brevitas, the slices of weights that it scales."""
    channels: list[dict[tuple[str, str, int], int]] = [{} for _ in range(region.max_shape_srcs)]
    for side, sign in (("srcs", 1), ("sinks", -1)):
        for name, module in getattr(region, side).items():
            at = module.equalization_indexes
            for k in range(at.end - at.start):
                place = at.offset + k + (at.start if side == "srcs" else 0)
                if place < len(channels):
                    channels[place][name.split("$")[0], side, at.start + k] = sign
    return channels


def aimet(model: nn.Module, inputs: Any) -> Found:
    """Pairs of neighbours in the sets of layers that cross-layer scaling takes.

    Biases, which `equalize_model` absorbs afterwards, are left alone.
    """
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.cross_layer_equalization import CrossLayerScaling
    from aimet_torch.model_preparer import prepare_model

    begin = time.process_time()
    try:
        model = prepare_model(model)
    except Exception as error:  # the model as it is, then, which it may know as well
        print(f"not prepared: {error}", file=sys.stderr)
    fold_all_batch_norms(model, None, dummy_input=inputs)
    seconds = time.process_time() - begin
    model.double()
    inputs = in_double(inputs)
    before = outputs(model, inputs)
    begin = time.process_time()
    with double_by_default():
        sets = CrossLayerScaling.scale_model(model, None, dummy_input=inputs)
    seconds += time.process_time() - begin
    pairs = [pair for found in sets for pair in found.cls_pair_info_list]
    return {
        "regions": len(pairs),
        "channels": sum(len(pair.scale_factor) for pair in pairs),
        "independent": sum(len(pair.scale_factor) for pair in pairs),  # each has its own producer
        "seconds": seconds,
        "change": relative_change(before, outputs(model, inputs)),
    }


def torch_pruning(model: nn.Module, inputs: Any) -> Found:
    """Groups of coupled channels, the outputs' too: it removes channels and scales none."""
    import torch_pruning

    begin = time.process_time()
    graph = torch_pruning.DependencyGraph().build_dependency(model, inputs)
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    sizes = [len(group[0].idxs) for group in graph.get_all_groups(root_module_types=kinds)]
    return {
        "regions": len(sizes),
        "channels": sum(sizes),
        "independent": None,
        "seconds": time.process_time() - begin,
        "change": None,
    }


PASSES: Mapping[str, Callable[[nn.Module, Any], Found]] = {
    "enorm_fx": ours,
    "brevitas": brevitas,
    "aimet": aimet,
    "torch-pruning": torch_pruning,
}
PACKAGES = {"aimet": "aimet-torch"}  # where the name of the package is another


def independent(regions: Regions) -> int:
    """How many scales there are in overlapping regions: the rank of what their channels scale.

    regions: for each region its channels, each as {(layer, side, index): sign}.
    """
    rows = [row for region in regions for row in region if row]
    graph = nx.Graph()
    for i, row in enumerate(rows):
        graph.add_edges_from((i, entry) for entry in row)
    rank = 0
    for component in nx.connected_components(graph):
        members = [rows[i] for i in component if isinstance(i, int)]
        columns = {entry: j for j, entry in enumerate({e for row in members for e in row})}
        matrix = torch.zeros(len(members), len(columns), dtype=torch.float64)
        for i, row in enumerate(members):
            for entry, sign in row.items():
                matrix[i, columns[entry]] = sign
        rank += 1 if len(members) == 1 else int(torch.linalg.matrix_rank(matrix))
    return rank


def in_double(inputs: Any) -> Any:
    """Inputs in float64, a tensor or a tuple of them."""
    if isinstance(inputs, Tensor):
        return inputs.double()
    return tuple(in_double(item) if isinstance(item, Tensor) else item for item in inputs)


@contextmanager
def double_by_default() -> Iterator[None]:
    """Tensors that a model makes or casts by name as it runs are float64 too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(Tensor, "float", Tensor.double):
            yield
    finally:
        torch.set_default_dtype(before)


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """All tensors that a model in float64 gives."""
    inputs = in_double(inputs)
    with torch.no_grad(), double_by_default():
        result = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return [leaf.clone() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def made(name: str, seed: int) -> tuple[nn.Module, Any]:
    """A model in evaluation mode and its inputs."""
    torch.manual_seed(seed)
    model, inputs = build(name.removesuffix(AS_RELU))
    if name.endswith(AS_RELU):
        for module in list(model.modules()):
            for child, old in list(module.named_children()):
                if isinstance(old, nn.ReLU6):
                    setattr(module, child, nn.ReLU(old.inplace))
    draw_statistics(model)
    return model.eval(), inputs


def measure(library: str, name: str, seed: int) -> Found:
    """What a library finds on one model, or in one line why it finds nothing."""
    return guarded(library, *made(name, seed))


def guarded(library: str, model: nn.Module, inputs: Any) -> Found:
    """What a library finds, or the error that ended it."""
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(PATIENCE)
    try:
        found = PASSES[library](model, inputs)
        sound = found["change"] is None or found["change"] <= SOUND
        return {**found, "sound": sound}
    except Exception as error:  # whatever another library raises is a finding
        first = (str(error).strip().splitlines() or [""])[0]
        return {"error": f"{type(error).__name__}: {first}"[:200]}
    finally:
        signal.alarm(0)


def _too_long(signum: int, frame: Any) -> None:
    raise TimeoutError(f"not done after {PATIENCE} s")


def main(argv: list[str] | None = None) -> int:
    """Measure the models and print a line for each, the library's version first."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks._detect_pass")
    parser.add_argument("library", choices=PASSES)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the other libraries
    logging.disable(logging.CRITICAL)
    package = PACKAGES.get(options.library, options.library)
    print(json.dumps({"version": importlib.metadata.version(package)}), flush=True)
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    guarded(options.library, small, torch.randn(1, 3, 8, 8))  # imports are not measured
    for name in options.models:
        print(json.dumps({name: measure(options.library, name, options.seed)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
