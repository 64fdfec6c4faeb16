"""What is watched while a run trains: tensor statistics, the forgetting probe, alarms."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import tiny_llama, word_tokenizer
from safetensors.torch import save_file
from training import Recorder, TinyStudy

from qatrun.data import open_probe
from qatrun.errors import AlarmStop, DamagedFileError
from qatrun.evaluate.text import mean_nll
from qatrun.numerics import round_to_format
from qatrun.quant import STATISTICS, Mode, attach, make_plan
from qatrun.recipe import AlarmConfig, QatConfig
from qatrun.scheme import Scaling, Scheme, Slot
from qatrun.train import probe as probe_module
from qatrun.train.alarms import AlarmWatch
from qatrun.train.metrics import read_alarms, read_metrics
from qatrun.train.probe import Probe
from qatrun.train.tensors import TensorFile, read_tensor_stats

NO_AUTOCAST = contextlib.nullcontext


def table(count: int, **columns: Any) -> np.ndarray[Any, Any]:
    """Statistics of `count` tensors: NaN where not given."""
    values = [np.broadcast_to(columns.get(name, np.nan), count) for name in STATISTICS]
    return np.stack(values, axis=1).astype(np.float32)


def probed(rise: float, added: float | None = None, kl: float = 0.0, kl_added: float = 0.0) -> dict[str, float]:
    """What a probe finds, of a start model whose loss is 2; `added` by quantizers, None: none are in use."""
    row = {"nll_start": 2.0, "nll_off": 2.0 + rise, "kl_off": kl}
    return row if added is None else row | {"nll_on": 2.0 + rise + added, "kl_on": kl + kl_added}


class TestStatistics:
    def quantized(self, **qat: Any) -> tuple[Any, Any]:
        model = tiny_llama()
        state = attach(model, make_plan(model, QatConfig(**qat)))
        model.train()
        state.enter(Mode.QUANTIZE)
        return model, state

    def row(self, state: Any, taken: torch.Tensor, slot: str) -> dict[str, float]:
        return dict(zip(STATISTICS, taken[state.scales.index[Slot.parse(slot)]].tolist(), strict=True))

    def test_fractions_amax_and_noise_are_those_of_the_tensor(self) -> None:
        model, state = self.quantized(format="int8")
        ids = torch.arange(32).view(2, 16)
        model(input_ids=ids)
        state.push()
        state.tally.take()
        state.tally.measures_noise = True
        weight = model.model.layers[1].mlp.up_proj.weight
        slot = "model.layers.1.mlp.up_proj:weight"
        with torch.no_grad():
            weight[0, 0] = 40 * weight.abs().max()  # far above what the scale was made for
        model(input_ids=ids)
        scale = state.scales.scale[state.scales.index[Slot.parse(slot)]].clone()
        state.push()
        row = self.row(state, state.tally.take(), slot)
        grid = round_to_format(weight / scale, "int8")
        noise = (weight - grid * scale).square().sum()
        assert row["amax"] == weight.abs().max()
        assert row["scale"] == scale
        assert row["overshoot"] == pytest.approx(float(weight.abs().max() / (scale * 127)))
        assert row["clip_fraction"] == pytest.approx(1 / weight.numel())
        assert row["underflow_fraction"] == pytest.approx(float(((grid == 0) & (weight != 0)).float().mean()))
        assert row["sqnr_db"] == pytest.approx(float(10 * (weight.square().sum() / noise).log10()), abs=1e-3)

    def test_every_micro_batch_counts_and_a_recomputed_forward_changes_nothing(self) -> None:
        model, state = self.quantized(scaling={"window": 1})
        first, second = torch.arange(32).view(2, 16), torch.arange(30, 46).view(1, 16)
        model(input_ids=first)
        state.push()
        state.tally.take()
        with torch.no_grad():
            for p in model.parameters():
                p *= 1.5
        rows = []
        for batches in ((first, second), (first, first, second, second)):
            for ids in batches:
                model(input_ids=ids)
            amax = state.scales.amax.clone()
            rows.append(state.tally.take())
            assert torch.equal(state.scales.amax, amax)
        assert torch.equal(rows[0][:, 3:5].nan_to_num(), rows[1][:, 3:5].nan_to_num())

    def test_taking_begins_anew_and_evaluation_is_not_counted(self) -> None:
        model, state = self.quantized()
        ids = torch.arange(32).view(2, 16)
        model(input_ids=ids)
        state.push()
        assert not state.tally.take()[:, 0].eq(0).any()
        model.eval()(input_ids=ids)
        assert state.tally.take()[:, [1, 2, 3, 4, 5]].isnan().all()

    @pytest.mark.parametrize("scaling", [{"type": "dynamic"}, {"type": "delayed"}])
    def test_a_scale_of_the_tensor_at_hand_fits(self, scaling: dict[str, Any]) -> None:
        """Dynamic scaling, and the first step of delayed scaling, which has no history."""
        model, state = self.quantized(scaling=scaling)
        model(input_ids=torch.arange(32).view(2, 16))
        state.push()
        assert torch.allclose(state.tally.take()[:, 2], torch.ones(len(state.scales.names)))


def test_ema_is_the_weighted_mean_of_the_window() -> None:
    model = tiny_llama()
    plan = make_plan(model, QatConfig(scaling={"algorithm": "ema", "ema_decay": 0.8, "window": 3}))
    state = attach(model, plan)
    state.enter(Mode.QUANTIZE)
    seen: list[float] = []
    for amax in (0.0, 2.0, 5.0, 1.0, 0.0, 3.0):
        state.scales.amax.fill_(amax)
        state.push()
        seen.insert(0, amax)
        weights = [0.8**age if value > 0 else 0.0 for age, value in enumerate(seen[:3])]
        if sum(weights):
            mean = sum(w * v for w, v in zip(weights, seen[:3], strict=True)) / sum(weights)
            assert state.scales.scale.tolist() == pytest.approx([mean / 15] * len(state.scales.names), rel=1e-6)
    before = state.scales.scale.clone()
    state.scales.amax.fill_(float("inf"))
    state.push()
    assert torch.equal(state.scales.scale, before)


class TestTensorFile:
    def test_parts_are_read_back_in_order_with_nothing_where_nothing_was_measured(self, tmp_path: Path) -> None:
        file = TensorFile(tmp_path, ["a:input", "a:weight"])
        file.add(1, table(2, amax=[1.0, 2.0]))
        file.write(1)
        file.add(2, table(2, amax=3.0, scale=0.5, clip_fraction=0.25))
        file.write(2)
        rows = read_tensor_stats(tmp_path).to_pylist()
        assert [(row["step"], row["tensor"], row["amax"]) for row in rows] == [
            (1, "a:input", 1.0),
            (1, "a:weight", 2.0),
            (2, "a:input", 3.0),
            (2, "a:weight", 3.0),
        ]
        assert [row["clip_fraction"] for row in rows] == [None, None, 0.25, 0.25]

    def test_what_is_later_than_the_checkpoint_is_dropped(self, tmp_path: Path) -> None:
        file = TensorFile(tmp_path, ["a:input"])
        for step in (2, 4, 6):
            file.add(step, table(1, amax=step))
            file.write(step)
        TensorFile(tmp_path, ["a:input"]).begin(from_step=4)
        assert read_tensor_stats(tmp_path)["step"].to_pylist() == [2, 4]

    def test_a_long_run_of_a_large_model_is_small(self, tmp_path: Path) -> None:
        """182 linears for 10,000 steps: here 100 steps of incompressible numbers, times 100."""
        rng = np.random.default_rng(0)
        names = [
            f"model.layers.{i}.mlp.down_proj:{role}" for i in range(182) for role in ("input", "weight", "grad_output")
        ]
        file = TensorFile(tmp_path, names)
        for step in range(100):
            file.add(step + 1, rng.random((len(names), len(STATISTICS)), dtype=np.float32))
        file.write(100)
        assert 100 * (tmp_path / "tensors/step-000100.parquet").stat().st_size < 2**28


class TestProbe:
    def texts(self) -> torch.Tensor:
        return torch.randint(0, 90, (3, 16), generator=torch.Generator().manual_seed(0))

    def moved(self) -> Any:
        model = tiny_llama()
        with torch.no_grad():
            for p in model.parameters():
                p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        return model

    def test_the_start_model_has_not_moved_and_lost_nothing(self) -> None:
        model = tiny_llama()
        probe = Probe.of_start(model, self.texts(), 8, NO_AUTOCAST)
        nll, kl = probe.ask(model, NO_AUTOCAST)
        assert kl == pytest.approx(0.0, abs=1e-6)
        assert nll == probe.start_nll

    def test_the_loss_is_that_of_the_text(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """However many sequences fit into memory at once."""
        start, now = tiny_llama(), self.moved()
        monkeypatch.setattr(probe_module, "LOGITS_AT_ONCE", 16 * 101 * 2)
        probe = Probe.of_start(start, self.texts(), 8, NO_AUTOCAST)
        for model, nll in ((start, probe.start_nll), (now, probe.ask(now, NO_AUTOCAST)[0])):
            assert nll == pytest.approx(mean_nll(model, self.texts(), batch_size=3), rel=1e-5)

    def test_with_the_whole_vocabulary_it_is_the_exact_divergence_and_with_less_it_is_smaller(self) -> None:
        start, now = tiny_llama(), self.moved()
        p, q = (m.eval()(input_ids=self.texts()).logits.double().log_softmax(-1) for m in (start, now))
        exact = float((p.exp() * (p - q)).sum(-1).mean())
        assert exact > 0.01
        whole, few = (Probe.of_start(start, self.texts(), k, NO_AUTOCAST).ask(now, NO_AUTOCAST)[1] for k in (10**6, 4))
        assert whole == pytest.approx(exact, rel=1e-3)
        assert 0 < few < exact

    def test_it_is_kept_on_disk_and_leaves_the_model_as_it_was(self, tmp_path: Path) -> None:
        model = tiny_llama().train()
        probe = Probe.of_start(model, self.texts(), 8, NO_AUTOCAST)
        probe.save(tmp_path / "probe.safetensors")
        read = Probe.load(tmp_path / "probe.safetensors")
        assert all(torch.equal(value, vars(read)[name]) for name, value in vars(probe).items())
        before = torch.get_rng_state()
        read.ask(model, NO_AUTOCAST)
        assert model.training
        assert torch.equal(before, torch.get_rng_state())

    def test_one_of_an_earlier_version_is_named(self, tmp_path: Path) -> None:
        probe = vars(Probe.of_start(tiny_llama(), self.texts(), 8, NO_AUTOCAST))
        file = tmp_path / "probe.safetensors"
        save_file({name: value for name, value in probe.items() if name != "nll"}, file)
        with pytest.raises(
            DamagedFileError, match="an earlier version wrote it, which kept no loss of the start model"
        ):
            Probe.load(file)


class TestAlarms:
    names = ("a:input", "b:input", "a:weight")

    def watch(self, **config: Any) -> AlarmWatch:
        scheme = Scheme("hif8", "per_tensor", 15.0, Scaling(algorithm="most_recent", window=1))
        return AlarmWatch(AlarmConfig(**config), dict.fromkeys(map(Slot.parse, self.names), scheme))

    def test_clipping_that_lasts_is_raised_once_with_the_worst_tensor_and_what_to_do(self) -> None:
        watch = self.watch(patience=4)
        clipping = table(3, clip_fraction=[0.0, 0.01, 0.0], overshoot=[1.0, 6.2, 1.0])
        raised = [alarm for step in range(740, 760) for alarm in watch.see_tensors(step, clipping, 1)]
        assert raised == [
            {
                "step": 740,
                "kind": "saturation",
                "text": "step 740: 1 of 2 inputs clip > 0.1 % of their values over 4 steps, worst b (0.25 %, overshoot "
                "6.2x): scale estimates lag; in qat.scaling use algorithm max, widen window (1)",
                "tensor": "b:input",
            }
        ]

    def test_a_constant_overshoot_is_no_growth(self) -> None:
        """At exactly twice, too; one that lasts for a step is none."""
        scheme = Scheme("int8", "per_tensor", 127.0, Scaling(window=64))
        said = {}
        for name, overshoots in {
            "constant": [2.0] * 20,
            "growing": [1.01, 1.02, 1.05] * 7,
            "burst": [1.0, 1.0, 9.0],
        }.items():
            watch = AlarmWatch(AlarmConfig(patience=40), {Slot.parse("a:input"): scheme})
            for step, overshoot in enumerate(overshoots):
                clips = 0.1 if step == len(overshoots) - 1 else 0.0
                for alarm in watch.see_tensors(step, table(1, clip_fraction=clips, overshoot=overshoot), 1):
                    said[name] = alarm["text"]
        assert "(0.25 %, overshoot 2.0x): scales are too small by a steady factor" in said["constant"]
        assert "amax grows faster than a window of 64 sees" in said["growing"]
        assert "amax jumps above all that a window of 64 has seen" in said["burst"]

    def test_one_burst_in_a_long_run_is_none(self) -> None:
        watch = self.watch()
        quiet, burst = table(3, clip_fraction=0.0), table(3, clip_fraction=0.015)
        assert not [a for step in range(100) for a in watch.see_tensors(step, burst if step == 50 else quiet, 1)]

    def test_coarse_tensors_need_two_measurements_in_a_row(self) -> None:
        watch = self.watch()
        coarse, fine = (table(3, clip_fraction=0.0, sqnr_db=[30.0, 30.0, db]) for db in (4.0, 12.0))
        not_measured = table(3, clip_fraction=0.0)
        found = [
            list(watch.see_tensors(i, t, 1)) for i, t in enumerate((coarse, fine, coarse, not_measured, coarse, coarse))
        ]
        assert [[alarm["kind"] for alarm in alarms] for alarms in found] == [[], [], [], [], ["resolution"], []]
        assert "worst a (4.0 dB)" in found[4][0]["text"]

    def test_null_thresholds_never_raise(self) -> None:
        watch = self.watch(clip_fraction=None, sqnr_db=None, forgetting_nats=None, quantization_nats=None)
        bad = table(3, clip_fraction=1.0, overshoot=9.0, sqnr_db=-3.0)
        assert not [
            a
            for step in range(99)
            for a in (*watch.see_tensors(step, bad, 1), *watch.see_probe(step, probed(9.0, 99.0)))
        ]

    def test_a_resumed_watch_goes_on_where_it_was(self) -> None:
        clipping = table(3, clip_fraction=0.004, overshoot=1.5)
        whole, first = self.watch(), self.watch()
        expected = [a for step in range(9) for a in whole.see_tensors(step, clipping, 1)]
        found = [a for step in range(4) for a in first.see_tensors(step, clipping, 1)]
        second = self.watch()
        second.load_state_dict(first.state_dict())
        found += [a for step in range(4, 9) for a in second.see_tensors(step, clipping, 1)]
        assert found == expected
        assert expected

    def test_what_an_earlier_version_kept_of_a_watch_can_be_taken_up(self) -> None:
        kept = {"clipping": [0.0, 0.1, 0.0], "coarse_measurements": [0, 1, 0], "raised": ["forgetting"]}
        watch = self.watch()
        watch.load_state_dict(kept | {"forgetting_probes": 3, "quantization_probes": 1})
        assert watch.clipping.tolist() == kept["clipping"]
        assert not [alarm for step in range(3) for alarm in watch.see_probe(step, probed(0.3))]  # raised once


class TestInTraining:
    def test_statistics_probe_and_alarms_of_a_run(self, tmp_path: Path) -> None:
        study = TinyStudy(tmp_path / "a", monitor={"every": 2})
        segments = study.arms["hif8"]
        study.train(segments.trunk)
        study.train(segments.own)
        assert sorted(set(read_tensor_stats(segments.own.folder)["step"].to_pylist())) == [4, 6]
        rows = {row["step"]: row for row in read_metrics(segments.own.folder / "metrics.jsonl") if "nll_off" in row}
        assert list(rows) == [2, 3, 4, 6, 7]  # every 2 steps, and the last of each segment
        assert [{"kl_on", "nll_on"} <= row.keys() for row in rows.values()] == [False, False, True, True, True]
        assert len({row["nll_start"] for row in rows.values()}) == 1
        kinds = [row["kind"] for row in read_alarms(segments.own.folder / "alarms.jsonl")]
        assert kinds[:2] == ["input", "forgetting"]  # it is an untrained model
        assert set(kinds) == {"input", "forgetting", "resolution"}

    def test_watching_changes_no_number(self, tmp_path: Path) -> None:
        final = []
        for name, monitor in (("watched", {}), ("not", {"probe": None, "sqnr_every": None, "every": 5})):
            model = TinyStudy(tmp_path / name, monitor=monitor).train_arm()
            final.append(model.state_dict())
        assert all(torch.equal(value, final[1][name]) for name, value in final[0].items())

    def test_a_probe_that_was_turned_on_too_late_says_so(self, tmp_path: Path) -> None:
        TinyStudy(tmp_path / "a", monitor={"probe": None}).train_arm()
        late = TinyStudy(tmp_path / "a").arms["hif8"].own
        (late.folder / "checkpoints").rename(tmp_path / "gone")
        listener = Recorder()
        TinyStudy(tmp_path / "a").train(late, listener)
        assert listener.warnings == ["no forgetting probe in hif8: the start model was not asked before the first step"]
        assert not any("kl_off" in row for row in listener.rows)

    def test_an_alarm_may_end_the_run_which_can_go_on(self, tmp_path: Path) -> None:
        study = TinyStudy(tmp_path / "a", monitor={"on_alarm": "stop"})
        trunk = study.arms["hif8"].trunk
        for raised in ("step 1: the first loss is", "step 3: with quantizers off the loss"):
            with pytest.raises(
                AlarmStop, match=rf"(?s)stopped by an alarm .* in trunk, and saved: {raised}.*add an arm"
            ):
                study.train(trunk, listener := Recorder())
            assert len(listener.alarms) == 1
        _, outcome = study.train(trunk)
        assert outcome.steps == 3


def test_only_text_that_is_given_is_read_for_the_probe(tmp_path: Path) -> None:
    config = TinyStudy(tmp_path / "a").arms["bf16"].own.arm.data
    assert open_probe(config, word_tokenizer(), 99) is None
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "' + "w1 w2 w3 " * 30 + '"}\n', encoding="utf-8")
    own = config.model_copy(update={"probe": config.train.model_copy(update={"path": str(other)})})
    given = open_probe(own, word_tokenizer(), 3)
    assert given is not None
    assert given.shape == (3, 16)
    assert given.unique().numel() <= 4
