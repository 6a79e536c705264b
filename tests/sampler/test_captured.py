"""Captured pieces do what eager calls do: on the pretended device, with recorded graphs (recorder.py), which know
addresses only and spoil what they allocate."""

import copy
import itertools
import logging
import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adadiff.forward import runner, spaces
from adadiff.forward.count_sync import bucket
from adadiff.forward.forward import forward
from adadiff.forward.options import ExecutionOptions
from adadiff.policies.exits import BatchMean, Depth, Full, Patience, Replay, Threshold
from adadiff.policies.interface import ExitPolicy
from adadiff.uem import OFFICIAL, PAPER, ExitConfig
from pretend import OnDevice, elsewhere, moved
from recorder import recorded
from sampler.captured import Captured, depths
from sampler.tiny import BATCH, Case, case, thresholds

LANES = torch.arange(BATCH)
NETWORKS = [
    pytest.param("uvit", PAPER, id="uvit-paper"),
    pytest.param("dit", PAPER, id="dit-paper"),
    pytest.param("uvit", OFFICIAL, id="uvit-official", marks=pytest.mark.slow),
    pytest.param("uvit", ExitConfig(head="block"), id="uvit-block", marks=pytest.mark.slow),
]


@pytest.fixture(params=[False, True], ids=["plain", "fused"])
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Blocks as they are called on a device, with one pass after each branch, and as where there is no kernel."""
    monkeypatch.setattr(runner, "is_fused", lambda *_: request.param)
    return request.param


@pytest.mark.parametrize("count_sync", [None, pytest.param("lagged", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("kind", "config"), NETWORKS)
def test_pieces_equal_eager_for_every_pattern(kind, config, count_sync, fused, monkeypatch) -> None:
    """One space of 16 lanes serves 13, 5 and 1 of them; every piece is run, captured and replayed."""
    c = case(kind, config, torch.float32)
    with recorded(monkeypatch) as graphs:
        call = Captured(elsewhere(c), c, max_lanes=16, count_sync=count_sync)
        for lanes in (LANES, LANES[[4, 1, 9, 0, 3]], LANES[[7]], LANES):
            for depth in list(depths(len(lanes), c.num_layers).values())[:: 1 if lanes is LANES else 3]:
                for record_scores in (False, True, True):
                    call.agrees(lanes, policy=Replay(), threshold=depth, record_scores=record_scores)
    assert graphs.captures > c.num_layers
    assert graphs.replays > graphs.captures


class Asked(ExitPolicy):
    """Without limits: asked in Python, between two pieces. By the threshold, but never after layer 2."""

    needs_scores, threshold = True, 0.5

    def exit_mask(self, u: Tensor | None, layer: int, context: object) -> Tensor:
        return (u < context.threshold) & (layer != 2)


class AskedLate(Asked):
    """Its first layers are those of a policy with limits that asks late, but for what comes between two pieces."""

    def exit_layers(self, num_layers: int) -> range:
        return range(3, num_layers)


def policies(c: Case) -> dict[str, dict]:
    threshold, partner = thresholds(c), LANES.clone()
    partner[[2, 7]] = torch.tensor([7, 2])
    tied = threshold.clone()
    tied[7] = tied[2]
    mixed = [Threshold(0.5), Patience(0.5), Depth(3.5)]
    return {
        "threshold": {"policy": Threshold(0.5), "threshold": threshold},
        "tied": {"policy": Threshold(0.5), "threshold": tied, "cfg_partner": partner},
        "patience": {"policy": Patience(0.5), "threshold": threshold},
        "mixed": {
            "policy": mixed,
            "policy_index": LANES % 3,
            "threshold": threshold.where(LANES % 3 < 2, torch.tensor(2.5)),
        },
        "asked": {"policy": Asked(), "threshold": threshold},
        "asked, tied": {"policy": Asked(), "threshold": tied, "cfg_partner": partner},
        "asked late": {"policy": AskedLate(), "threshold": threshold},
        "late": {"policy": Threshold(0.5, min_layer=3), "threshold": threshold},
        "full": {"policy": Full()},
    }


@pytest.mark.parametrize(("kind", "config"), NETWORKS)
def test_pieces_equal_eager_for_every_policy(kind, config, fused, monkeypatch) -> None:
    """One after the other on the same pieces, which know of none of them."""
    c = case(kind, config, torch.float32)
    with recorded(monkeypatch):
        call = Captured(elsewhere(c), c)
        for _ in range(2):
            for own in policies(c).values():
                call.agrees(LANES, **own, record_scores=True)


def test_policies_with_limits_share_no_pieces_with_those_that_are_asked(monkeypatch) -> None:
    """The one leaves to its piece what the other does between two pieces, such as noting where long skips lie."""
    c = case("uvit", PAPER, torch.float32)
    with recorded(monkeypatch):
        call = Captured(elsewhere(c), c)
        stays = thresholds(c).where(LANES % 3 > 0, torch.tensor(1e-6))  # to the blocks that join skips
        for name in ("asked late", "asked late", "threshold", "late", "threshold", "asked late"):
            call.agrees(LANES, **policies(c)[name] | {"threshold": stays})


def test_passes_in_any_mode_share_a_space(monkeypatch) -> None:
    """Tensors of inference mode cannot be written outside of it."""
    c = case("uvit", PAPER, torch.float32)
    with recorded(monkeypatch) as graphs:
        call = Captured(elsewhere(c), c)
        for inference in (True, False, True, False):
            with torch.inference_mode(inference):
                call.agrees(LANES, policy="exit:depth=5", record_scores=True)
    assert graphs.replays > graphs.captures > 0


def test_a_policy_that_looks_at_the_whole_batch(monkeypatch) -> None:
    c = case("uvit", OFFICIAL, torch.float32)
    with recorded(monkeypatch):
        call = Captured(elsewhere(c), c, max_lanes=20, strict=False)  # it may look
        for threshold in (0.45, 0.5, 0.5, 0.55, 0.5):
            call.agrees(LANES, policy=BatchMean(threshold, patience=False), record_scores=True)


@settings(deadline=None, max_examples=10)
@given(st.data())
def test_any_sequence_of_passes_on_one_space(data: st.DataObject) -> None:
    """Of any numbers of lanes, with any policies, and counts that the host sees late."""
    c = case("uvit", PAPER, torch.float32)
    delays = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    count_sync = data.draw(st.sampled_from([None, "sync", "sync:2", "lagged", "lagged:2"]))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runner, "is_fused", lambda *_: True)
        with recorded(patched, delay=itertools.cycle(delays).__next__):
            call = Captured(elsewhere(c), c, max_lanes=data.draw(st.integers(BATCH, 40)), count_sync=count_sync)
            for _ in range(data.draw(st.integers(2, 6))):
                n = data.draw(st.integers(1, BATCH))
                lanes = LANES[torch.randperm(BATCH, generator=torch.Generator().manual_seed(n))[:n]]
                depth = torch.tensor(data.draw(st.lists(st.integers(1, c.num_layers), min_size=n, max_size=n))).float()
                given = data.draw(
                    st.sampled_from(
                        [
                            {"policy": Replay(), "threshold": depth},
                            {"policy": Threshold(0.5), "threshold": thresholds(c)[lanes]},
                            {"policy": Asked(), "threshold": thresholds(c)[lanes]},
                            {"policy": Full()},
                        ]
                    )
                )
                call.agrees(lanes, **given, record_scores=data.draw(st.booleans()))


def test_nan_in_a_sample_reaches_nobody(fused, monkeypatch) -> None:
    c = case("dit_nan", PAPER, torch.float32)
    x, t, context = c.given.all
    x = x.clone()
    x[4] = math.nan
    hurt = Case(c.backbone, c.exits, type(c.given)(x, t, context), c.predictions, c.uncertainties)
    depth, others = depths(BATCH, c.num_layers)["spread"], LANES != 4
    with recorded(monkeypatch):
        clean, call = Captured(elsewhere(c), c, max_lanes=16), Captured(elsewhere(c), hurt, max_lanes=16)
        for _ in range(3):
            want = clean(LANES, policy=Replay(), threshold=depth).prediction.held
            found = call(LANES, policy=Replay(), threshold=depth).prediction.held
            assert found[4].isnan().all()
            torch.testing.assert_close(found[others], want[others], rtol=1e-5, atol=2e-5)


# ---- what lives longer than a pass ----


def test_values_are_read_anew_and_new_weights_are_noticed(monkeypatch) -> None:
    """Values may change where they lie; other tensors, or other modules, in the places of weights need new pieces."""
    c = copy.deepcopy(case("uvit", PAPER, torch.float32))
    with recorded(monkeypatch) as graphs:
        call = Captured(elsewhere(c), c)
        backbone = call.model.backbone

        def passes(captures: bool) -> None:
            before = graphs.captures
            for _ in range(3):
                call.agrees(LANES, policy="exit:depth=5", record_scores=True)
            assert (graphs.captures > before) == captures

        passes(True)
        for own in (c.backbone, backbone):
            value = own.mid_block.mlp.fc2.bias
            (value.held if isinstance(value, OnDevice) else value.data).add_(0.5)
        passes(False)
        c.backbone.mid_block.mlp.fc2.bias.data = c.backbone.mid_block.mlp.fc2.bias + 0.5
        backbone.mid_block.mlp.fc2._parameters["bias"] = OnDevice(c.backbone.mid_block.mlp.fc2.bias.detach().clone())
        passes(True)
        c.backbone.in_blocks[1].attn = copy.deepcopy(c.backbone.in_blocks[0].attn)
        backbone.in_blocks[1].attn = moved(c.backbone.in_blocks[0].attn)
        passes(True)
        c.exits.weight.data = c.exits.weight * 2
        call.model.exits._parameters["weight"] = OnDevice(c.exits.weight.detach().clone())
        passes(True)


def test_a_model_that_is_gone_keeps_no_memory(monkeypatch) -> None:
    c = case("uvit", PAPER, torch.float32)
    with recorded(monkeypatch):
        call = Captured(elsewhere(c), c)
        call(LANES, policy=Full())
        assert len(spaces._spaces.of) == 1
        del call
        assert len(spaces._spaces.of) == 0


def test_memory_runs_out_in_the_middle(monkeypatch) -> None:
    """The error is raised, nothing of the pass is kept, and the next one is right."""
    c = case("uvit", PAPER, torch.float32)
    with recorded(monkeypatch) as graphs:
        depth = depths(BATCH, c.num_layers)["spread"]
        given = {"policy": Replay(), "threshold": depth, "record_scores": True}
        for place in range(5):
            call, calls = Captured(elsewhere(c), c), itertools.count()
            graphs.fails = lambda calls=calls, place=place: (
                torch.OutOfMemoryError("no memory") if next(calls) == place else None
            )
            call(LANES, **given)
            with pytest.raises(torch.OutOfMemoryError):
                call(LANES, **given)
            graphs.fails = lambda: None
            for _ in range(3):
                call.agrees(LANES, **given)


def test_what_cannot_be_captured_runs_without_a_graph(monkeypatch, caplog) -> None:
    c = case("uvit", PAPER, torch.float32)
    with recorded(monkeypatch) as graphs, caplog.at_level(logging.WARNING, "adadiff"):
        graphs.fails = lambda: RuntimeError("operation not permitted when stream is capturing")
        call = Captured(elsewhere(c), c)
        for _ in range(4):
            call.agrees(LANES, policy="exit:depth=5")
    pieces = 1 + 5 + 1 + 1 - 1  # stem, layers, head; who exits at the last layer that is run leaves nobody to finish
    assert len(caplog.records) == pieces
    assert "layer 1" in caplog.text or "'layer', 1" in caplog.text
    assert graphs.captures == 0


def test_threads_share_no_memory(monkeypatch) -> None:
    """Each captures for itself, and all are right, though they take turns at any time."""
    c, found = case("uvit", PAPER, torch.float32), []
    with recorded(monkeypatch):
        call = Captured(elsewhere(c), c, max_lanes=16)

        def some(shift: int) -> None:
            try:
                for depth in list(depths(BATCH, c.num_layers).values()) * 2:
                    call.agrees(LANES, policy=Replay(), threshold=depth.roll(shift), record_scores=True)
            except BaseException as error:
                found.append(error)

        workers = [threading.Thread(target=some, args=(shift,)) for shift in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not found


def test_every_batch_of_a_space_launches_over_its_buckets(monkeypatch) -> None:
    c = case("uvit", PAPER, torch.float32)
    with recorded(monkeypatch):
        call = Captured(elsewhere(c), c, max_lanes=64, count_sync="sync")
        lanes = torch.cat([LANES, LANES[:8]])
        depth = depths(len(lanes), c.num_layers)["spread"]
        result = call.agrees(lanes, policy=Replay(), threshold=depth)
    runs = [int((depth >= layer).sum()) for layer in range(1, c.num_layers + 1)]
    assert list(result.rows) == [bucket(n, 64) for n in runs]
    assert any(n % 2 for n in runs if n > 16)  # some of which are no buckets themselves


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match="max_lanes is for runner='captured'"):
        ExecutionOptions(max_lanes=4)
    with pytest.raises(ValueError, match="max_lanes must be a whole number"):
        ExecutionOptions(runner="captured", max_lanes=0)
    with pytest.raises(ValueError, match="lane by lane, which is not captured"):
        ExecutionOptions(runner="captured", batch_invariant=True)
    c = case("uvit", PAPER, torch.float32)
    with pytest.raises(ValueError, match="captures the work of a GPU"):
        forward(c, *c.given.all, execution=ExecutionOptions(runner="captured"))


def test_labels_of_the_host_are_checked(monkeypatch) -> None:
    """Pieces read them on the device, where nobody does."""
    c = case("uvit", PAPER, torch.float32)
    x, t, context = c.given.all
    wrong = Case(c.backbone, c.exits, type(c.given)(x, t, context + 99), c.predictions, c.uncertainties)
    with recorded(monkeypatch):
        model = elsewhere(c)
        for own in (c, wrong, c):
            call = Captured(model, own)
            if own is wrong:
                with pytest.raises(ValueError, match="labels must be in"):
                    call(LANES, policy="full")
            else:
                call.agrees(LANES, policy="full")
