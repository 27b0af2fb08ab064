"""What the commands of this folder are given alike, and the images that they take."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks._environment import RESULTS
from benchmarks.quantize.methods import PEERS

CALIBRATION = 512  # training images that activations are calibrated and smoothed with


def add_options(parser: argparse.ArgumentParser, output: str) -> None:
    """Images, folders and peers. output: name of the JSON in `benchmarks/results`."""
    add = parser.add_argument
    add("--images", type=int, default=3_000, help="of the test set, the first")
    add("--data", type=Path, help="folder of Fashion-MNIST")
    add("--cache", type=Path, required=True, help="for trained weights, and finished records")
    add("--peer", action="append", default=[], metavar="NAME=PYTHON")
    add("--output", type=Path, default=RESULTS / output)


def peers_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, str]:
    """By name of a peer, a Python that has it; ends the command for one that is not known."""
    peers = dict(peer.split("=", 1) for peer in options.peer)
    if unknown := peers.keys() - set(PEERS):
        parser.error(f"no such peer: {', '.join(unknown)}")
    return peers
