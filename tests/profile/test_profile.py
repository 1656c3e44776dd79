"""Hardware profiles: fits give back the curves behind the points, files are whole or refused, places told apart."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prescope.core.machine import CPU_DEVICE, Place, this_place
from prescope.core.types import ExpertSize, MoEShape
from prescope.errors import BadProfile, ForeignProfile, NoProfile, UnsupportedOption
from prescope.profile import Circumstances, HardwareProfile, Point, markdown, tokens_per_expert
from prescope.profile.curves import ExpertCurve, LinkCurve, fit_line, interpolate, rising
from prescope.profile.files import own_file, shipped_files
from prescope.scheduler.costs import ASSUMED_HANDOVER, HANDOVER_US

MB = 10**6
SMALL, LARGE = ExpertSize(9_437_184, 2048, 768), ExpertSize(12_582_912, 2048, 1024)
PLACE = Place("Some CPU (family 6)", 16, "NVIDIA H200", "PCIe 5 x16")
LATENCY_US, LINK_GB_PER_S, CPU_GB_PER_S, CPU_BASE_US = 8.0, 50.0, 70.0, 30.0
SHAPE = MoEShape(num_layers=16, num_experts=128, top_k=8, row_bytes=SMALL.nbytes)


def point(kind: str, us: float, busy: bool = False, **of: int) -> Point:
    return Point(Circumstances(kind, busy, **of), us, 0.02, 5)


def cpu_us(expert: ExpertSize, tokens: int) -> float:
    """The curve that the points below are made from: bound by reading the weights, then by arithmetic."""
    return expert.nbytes / (CPU_GB_PER_S * 1e3) * max(1.0, tokens / 8)


def points() -> list[Point]:
    made = [
        point("h2d", LATENCY_US + n / (LINK_GB_PER_S * 1e3) * (1.25 if busy else 1.0), busy, nbytes=n)
        for n in (1 << 16, 1 << 20, 4 << 20, 64 << 20)
        for busy in (False, True)
    ]
    for expert in (SMALL, LARGE):
        size = {"nbytes": expert.nbytes, "width": expert.width, "expert_width": expert.expert_width}
        for experts, tokens in ((1, 1), (2, 1), (4, 1), (8, 1), (8, 2), (8, 8), (8, 16), (8, 64)):
            for busy in (False, True):
                us = CPU_BASE_US + experts * cpu_us(expert, tokens) * (1.5 if busy else 1.0)
                made.append(point("cpu", us, busy, **size, experts=experts, tokens=tokens))
        for experts, tokens in ((2, 1), (8, 1), (8, 64)):
            us = 20.0 + experts * expert.nbytes / 4e6
            made.append(point("gpu", us, **size, experts=experts, tokens=tokens))
    size = {"nbytes": SMALL.nbytes, "width": SMALL.width, "expert_width": SMALL.expert_width}
    made += [point("rest", 60.0, **size, tokens=1), point("rest", 74.0, **size, tokens=8)]
    made += [point("decide", 25.0, **size, tokens=1)]
    made += [point("batch", 9.0), point("enqueue", 4.0), point("read", 14.0), point("message", 11.0)]
    made += [point("handover", 11.0), point("handover", 13.0, busy=True)]
    made += [point("dram", 1e4, nbytes=900 * MB), point("dram", 1.3e4, busy=True, nbytes=900 * MB)]
    return made


def profile(**changes) -> HardwareProfile:
    made = HardwareProfile(
        place=PLACE, label="measured on NVIDIA H200", measured="2026-11-24", points=tuple(points()), cpu_backend="torch"
    )  # fmt: skip
    return replace(made, **changes)


# -- fits ------------------------------------------------------------------------------------------------------------


@given(
    base=st.floats(0.0, 500.0),
    slope=st.floats(1e-3, 50.0),
    xs=st.lists(st.integers(1, 10_000), min_size=2, max_size=12, unique=True),
)
@settings(max_examples=60, deadline=None)
def test_a_line_is_found_again_from_its_points(base, slope, xs):
    line = fit_line(xs, [base + slope * x for x in xs])
    assert line.error.worst < 1e-6
    assert line.at(3.0) == pytest.approx(base + slope * 3.0, rel=1e-4, abs=1e-3)


def test_no_fitted_coefficient_is_negative():
    """A negative latency or rate would make small, or large, copies end before they began."""
    falling, through_below_zero = fit_line([1, 2, 3], [9.0, 6.0, 3.0]), fit_line([1, 2, 3], [1.0, 4.0, 7.0])
    assert min(falling[:2]) >= 0 and min(through_below_zero[:2]) >= 0
    assert through_below_zero.base_us == 0.0 and falling.slope >= 0.0


def test_link_times_are_exact_at_measured_sizes_and_go_on_at_the_fitted_rate():
    made = profile()
    for of, us, *_ in (p for p in made.points if p.of.kind == "h2d"):
        assert made.link_us(of.nbytes, busy_cpu=of.busy) == pytest.approx(us)
    assert made.lanes.link.rate_gb_per_s == pytest.approx(LINK_GB_PER_S)
    assert made.lanes.link.line.base_us == pytest.approx(LATENCY_US)
    assert made.link_us(640 << 20) == pytest.approx(LATENCY_US + (640 << 20) / (LINK_GB_PER_S * 1e3))
    assert made.link_us(1) <= made.link_us(1 << 16)


def test_more_bytes_or_tokens_never_take_less_time():
    made = profile()
    for name in ("link_us", "cpu_us", "gpu_us"):
        of = [] if name == "link_us" else [SMALL]
        times = [getattr(made, name)(n, *of) for n in (1, 2, 5, 9, 17, 64, 300, 1 << 16, 1 << 28)]
        assert times == sorted(times), name


def test_cpu_times_give_back_the_curve_behind_them():
    made = profile()
    for busy, factor in ((False, 1.0), (True, 1.5)):
        assert made.base_us("cpu", SMALL, busy_link=busy) == pytest.approx(CPU_BASE_US, rel=1e-6)
        for tokens in (1, 2, 8, 16, 64, 128):
            expected = factor * cpu_us(SMALL, tokens)
            assert made.cpu_us(tokens, SMALL, busy_link=busy) == pytest.approx(expected, rel=1e-6)
    assert made.cpu_us(0, SMALL) == 0.0


def test_a_size_that_was_not_measured_is_scaled_by_bytes_and_its_error_is_known():
    made, other = profile(), ExpertSize(6_291_456, 2048, 512)
    assert made.cpu_us(1, other) == pytest.approx(made.cpu_us(1, SMALL) * other.nbytes / SMALL.nbytes)
    assert made.fit_errors["cpu, scaled from another size"].worst < 1e-6  # the points are made so
    assert "scaled" in made.costs(other.nbytes, width=2048, expert_width=512, rest_us=50.0).source


def test_the_nearest_size_is_one_of_the_same_dtype():
    """An expert in float32 takes another kernel than one of as many bytes in bfloat16."""
    float32 = ExpertSize(2 * SMALL.nbytes, SMALL.width, SMALL.expert_width)
    row = {"nbytes": float32.nbytes, "width": 2048, "expert_width": 768, "experts": 8, "tokens": 1}
    made = profile(points=(*points(), point("gpu", 8e3, **row)))
    assert made.gpu_us(1, float32._replace(nbytes=float32.nbytes // 2, expert_width=384)) == pytest.approx(
        500.0
    )


def test_fit_errors_show_a_point_that_does_not_fit():
    crooked = [
        p._replace(us=p.us * 2) if p.of == Circumstances("h2d", nbytes=4 << 20) else p for p in points()
    ]
    assert profile().fit_errors["link"].worst < 1e-6
    assert profile(points=tuple(crooked)).fit_errors["link"].worst > 0.2


def test_a_point_that_is_missing_takes_no_other_with_it():
    """Without the fewest tokens of the most experts the curve is that of the tokens there are, not of one expert."""
    size = {"nbytes": SMALL.nbytes, "width": SMALL.width, "expert_width": SMALL.expert_width}
    measured = {(1, 1): 206.0, (2, 4): 234.0, (2, 16): 250.0, (2, 64): 490.0}
    curve = ExpertCurve.through(
        [point("gpu", us, **size, experts=n, tokens=t) for (n, t), us in measured.items()]
    )
    assert [2 * curve.us(t) for t in (1, 4, 16, 64)] == [234.0, 234.0, 250.0, 490.0] and curve.base_us == 0
    assert curve.error.worst == pytest.approx(1 - 117 / 206)  # and what does not fit is in its error


@given(st.lists(st.floats(0.1, 100.0), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_noise_is_smoothed_to_what_never_falls(us):
    smooth = rising(us)
    assert smooth == sorted(smooth) and sum(smooth) == pytest.approx(sum(us))
    assert us != sorted(us) or smooth == us


def test_interpolation_does_not_fall_behind_its_end():
    assert interpolate(10, [1, 4], [5.0, 3.0]) == 3.0
    assert interpolate(7, [1, 4], [3.0, 6.0]) == 9.0


# -- costs -----------------------------------------------------------------------------------------------------------


def test_costs_are_the_measured_times():
    made = profile()
    costs = made.costs(SHAPE, width=2048, expert_width=768, batch=1)
    assert costs.link_us == pytest.approx(made.link_us(SMALL.nbytes))
    assert costs.link_busy_us == pytest.approx(made.link_us(SMALL.nbytes, busy_cpu=True))
    assert costs.link_us < costs.link_busy_us
    assert costs.gpu_us == pytest.approx(made.gpu_us(1, SMALL))
    assert costs.rest_us == pytest.approx(60.0 + 20.0)  # and the layer's own launches
    assert costs.decide_us == pytest.approx(25.0)
    assert costs.copy_us == pytest.approx(4.0)
    assert (costs.handover_us, "hand" in costs.source) == (pytest.approx(11.0), False)
    assert costs.cpu_us[:2] == (0.0, pytest.approx(1.5 * cpu_us(SMALL, 1)))
    assert costs.cpu_base_us > CPU_BASE_US
    assert len(costs.cpu_alone_us) == len(costs.cpu_us)
    for tokens in (1, 2, 4):
        assert costs.cpu_alone_us[tokens] == pytest.approx(made.cpu_us(tokens, SMALL, busy_link=False))
        assert costs.cpu_alone_us[tokens] < costs.cpu_us[tokens]
    assert "H200" in costs.source and "2026-11-24" in costs.source
    assert len(made.costs(SHAPE, width=2048, expert_width=768, batch=64).cpu_us) == 65
    assert made.costs(SHAPE, width=2048, expert_width=768, batch=8).rest_us == pytest.approx(94.0)


def test_costs_without_a_cpu_lane_have_the_link_to_themselves():
    made = profile()
    alone = made.costs(SHAPE, width=2048, expert_width=768, cpu_lane=False)
    assert (alone.cpu_us, alone.cpu_base_us) == ((), 0.0)
    assert alone.link_busy_us is None and alone.cpu_alone_us == ()


def test_costs_say_what_was_not_measured():
    with pytest.raises(BadProfile, match=r"calibrate\(engine\)"):
        profile().costs(LARGE.nbytes, width=2048, expert_width=1024)
    costs = profile().costs(LARGE.nbytes, width=2048, expert_width=1024, rest_us=70.0)
    assert costs.decide_us == pytest.approx(11.0)  # the message alone
    assert costs.batch_us == 9.0
    no_experts = profile(points=tuple(p for p in points() if p.of.kind == "h2d"))
    with pytest.raises(BadProfile, match="no experts"):
        no_experts.costs(SHAPE, width=2048, expert_width=768, rest_us=1.0)


def test_tokens_of_an_expert_lie_between_one_and_the_batch():
    assert tokens_per_expert(SHAPE, 1) == pytest.approx(1.0)
    assert 1.0 < tokens_per_expert(SHAPE, 64) < 64
    assert tokens_per_expert(SHAPE._replace(top_k=128), 64) == pytest.approx(64.0)
    assert tokens_per_expert(SMALL.nbytes, 64) == 1.0


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "prescope"


def test_a_profile_is_read_as_it_was_written(tmp_path):
    path = profile(notes=("a note",), machine={"cpu": "Some CPU"}).save(tmp_path / "p.json")
    assert HardwareProfile.load(path) == profile(notes=("a note",), machine={"cpu": "Some CPU"})
    assert [file.name for file in tmp_path.iterdir()] == ["p.json"]  # nothing unfinished is left behind


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_refused_with_the_remedy(tmp_path, share):
    path = profile().save(tmp_path / "p.json")
    path.write_text(path.read_text()[: int(share * path.stat().st_size)])
    with pytest.raises(BadProfile, match=r"calibrate\(\)"):
        HardwareProfile.load(path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch": 0}, {"batch": -3}, {"batch": "x"}, {"batch": 2.5}, {"rest_us": -1.0}, {"rest_us": "x"},
        {"rest_us": math.nan},
    ],
    ids=str,
)  # fmt: skip
def test_costs_of_no_batch_or_no_time_are_refused(wrong):
    """No tokens cost what one costs, and a rest below 0 was taken off the experts' launch."""
    with pytest.raises(UnsupportedOption, match=next(iter(wrong))):
        profile().costs(SHAPE, width=2048, expert_width=768, **wrong)


def break_us(value):
    def change(contents):
        contents["points"][3][-3] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (break_us(math.nan), "finite"),
        (break_us(math.inf), "no measurement"),
        (break_us(-1.0), "negative"),
        (break_us("fast"), "numbers"),
        (break_us(1e-9), "no time is below"),
        (break_us(5e-300), "no time is below"),  # the fit's squares overflowed: numpy's LinAlgError
        (lambda c: c["points"][0].pop(), "values"),
        (lambda c: c["points"].append(c["points"][0]), "twice"),
        (lambda c: c.pop("label"), "label"),
        (lambda c: c.update(link_factor=0), "link_factor"),
        (lambda c: c.update(version=99), "99"),
        (lambda c: c.update(format="something.else"), "no hardware profile"),
        (lambda c: c.update(points=[]), "h2d"),
        (lambda c: c["place"].pop("cpu"), "place"),
    ],
)
def test_what_no_measurement_gives_is_refused(tmp_path, change, says):
    path = profile().save(tmp_path / "p.json")
    contents = json.loads(path.read_text())
    del contents["checksum"]  # else that it was changed is all that is said
    change(contents)
    path.write_text(json.dumps(contents))
    with pytest.raises(BadProfile, match=says):
        HardwareProfile.load(path)


def test_a_missing_file_names_those_that_come_with_prescope(tmp_path):
    with pytest.raises(BadProfile, match="come with prescope"):
        HardwareProfile.load("no-such-machine")


def test_every_profile_that_comes_with_prescope_can_be_read_and_is_labelled():
    for file in shipped_files():
        made = HardwareProfile.load(file.stem)
        assert made.origin and made.measured
        assert ("emulated" in made.label) == (made.link_gb_per_s is not None)
        assert made.describe().attrs["label"] == made.label


# -- which machine ---------------------------------------------------------------------------------------------------


def test_a_profile_of_another_machine_is_refused_and_the_remedy_named():
    assert not profile().is_this_machine()
    with pytest.raises(ForeignProfile, match=r"prescope\.calibrate\(\)"):
        profile().require_this_machine()
    here = profile(place=this_place())
    here.require_this_machine()
    assert here.is_this_machine()


@pytest.mark.parametrize("field", Place._fields)
def test_each_part_of_the_place_counts(field):
    here = this_place()
    other = here._replace(**{field: 3 * here.cores if field == "cores" else "another"})
    assert not profile(place=other).is_this_machine()
    assert own_file(other) != own_file(here)


def test_the_saved_profile_of_this_machine_is_found_again(cache):
    described = {"device": CPU_DEVICE, "link": "emulated"}
    saved = profile(place=this_place(described), link_gb_per_s=10.0, label="emulated link of 10 GB/s")
    assert saved.save().parent == cache
    assert HardwareProfile.of_this_machine(described) == saved
    slower = HardwareProfile.of_this_machine({**described, "link_gb_per_s": 5.0})
    assert slower.link_gb_per_s == 5.0 and "5 GB/s" in slower.label
    with pytest.raises(NoProfile, match=r"prescope\.calibrate\(\)"):
        HardwareProfile.of_this_machine({"device": "NVIDIA Z9", "link": "measured"})


# -- other links -----------------------------------------------------------------------------------------------------


def test_a_profile_of_before_says_what_is_assumed_of_hand_overs():
    """Where a GPU waits for the host; behind an emulated link the host launches each layer and nothing is assumed."""
    size = {"width": 2048, "expert_width": 768, "batch": 1}
    before = profile(points=tuple(p for p in points() if p.of.kind != "handover"))
    costs = before.costs(SHAPE, **size)
    assert costs.handover_us == HANDOVER_US and costs.source.endswith(ASSUMED_HANDOVER)
    emulated = replace(before, link_gb_per_s=8.0).costs(SHAPE, **size)
    assert emulated.handover_us == 0.0 and ASSUMED_HANDOVER not in emulated.source


@pytest.mark.parametrize(("factor", "name"), [(2, "PCIe 4"), (4, "PCIe 3")])
def test_an_emulated_link_sends_the_same_bytes_more_often_and_says_so_everywhere(
    factor, name, tmp_path, monkeypatch, cache
):
    monkeypatch.setattr("prescope.core.machine.gpu_links", lambda: {"GPU": "PCIe 5 x16"})
    real = profile(place=this_place())
    slow = real.emulated(factor, name)
    for nbytes in (1 << 16, SMALL.nbytes, 1 << 28):
        assert slow.link_us(nbytes) == pytest.approx(factor * real.link_us(nbytes))
    assert slow.cpu_us(4, SMALL) == real.cpu_us(4, SMALL)
    assert slow.gpu_us(4, SMALL) == real.gpu_us(4, SMALL)
    slow_costs = slow.costs(SHAPE, width=2048, expert_width=768)
    assert slow_costs.copy_us == pytest.approx(factor * 4.0)
    assert slow_costs.handover_us == pytest.approx(11.0 + (factor - 1) * 4.0), "one number and mark for all"
    assert "emulated" in slow.label and name in slow.label
    assert "emulated" in slow.describe().attrs["label"] and "emulated" in slow_costs.source
    assert HardwareProfile.load(slow.save(tmp_path / "slow.json")) == slow
    # An engine on the plain link must not be planned by it; one that sends everything as often may.
    assert not slow.is_this_machine()
    described = {"device": "GPU", "link": "emulated", "link_factor": factor}
    assert slow.is_this_machine(described) and not real.is_this_machine(described)
    real.save()
    assert HardwareProfile.of_this_machine(described) == slow
    assert HardwareProfile.of_this_machine({"device": "GPU", "link": "measured"}) == real
    with pytest.raises(UnsupportedOption):
        slow.emulated(2, "PCIe 2")


def test_a_real_link_has_no_rate_to_choose():
    with pytest.raises(UnsupportedOption, match="emulated"):
        profile().with_link(10.0)
    with pytest.raises(UnsupportedOption):
        profile(link_gb_per_s=10.0).emulated(2, "PCIe 4")


def test_another_rate_of_an_emulated_link_is_bytes_by_rate_unless_the_copy_itself_took_longer():
    label = f"emulated link of {LINK_GB_PER_S:g} GB/s"
    slower = profile(link_gb_per_s=LINK_GB_PER_S, label=label).with_link(5.0)
    assert slower.link_us(4 << 20) == pytest.approx((4 << 20) / 5e3)
    assert slower.label == "emulated link of 5 GB/s"
    faster = profile(link_gb_per_s=LINK_GB_PER_S, label=label).with_link(500.0)
    assert faster.link_us(1 << 16) == profile().link_us(1 << 16)  # bound by its latency
    assert faster.link_us(64 << 20) == pytest.approx((64 << 20) / 5e5)  # was bound by the link


def test_a_new_measurement_keeps_other_sizes_of_an_older_one():
    old, links = profile(), [p for p in points() if p.of.kind == "h2d"]
    of_large = [p for p in points() if p.of.expert == LARGE]
    new = profile(points=(*links, *(p._replace(us=2 * p.us) for p in of_large)))
    both = new.with_experts_of(old)
    assert both.cpu_us(1, LARGE) == pytest.approx(2 * old.cpu_us(1, LARGE))
    assert both.cpu_us(1, SMALL) == pytest.approx(old.cpu_us(1, SMALL))
    assert both.lanes.layer_us("rest", SMALL, 1) == 60.0
    assert not both.lanes.of("enqueue")  # a host cost belongs to the measurement as a whole
    other_backend = new.with_experts_of(replace(old, cpu_backend="native"))
    assert SMALL not in other_backend.lanes.cpu and SMALL in other_backend.lanes.gpu
    assert new.with_experts_of(replace(old, place=PLACE._replace(cores=8))) == new


# -- tables ----------------------------------------------------------------------------------------------------------


def test_the_description_holds_rates_and_errors_and_is_markdown():
    made = profile()
    rows = made.describe().set_index("what")
    assert rows.loc["link, rate by the fit", "value"] == pytest.approx(LINK_GB_PER_S)
    assert rows.loc["host memory read", "value"] == pytest.approx(90.0)
    reads = rows.loc[f"cpu, {SMALL}, weights read at 1 token", "value"]
    assert reads == pytest.approx(CPU_GB_PER_S)
    assert "worst" in rows.loc[f"cpu, {SMALL}, 1 tokens", "fit error"]
    text = markdown(made.describe())
    assert text.startswith("| what | value | unit | fit error |")
    assert len(text.splitlines()) == len(rows) + 2
    assert len(made.table()) == len(made.points)


def test_link_curve_needs_points():
    with pytest.raises(BadProfile):
        LinkCurve.through([])
