"""A study opens in optuna-dashboard as it is."""

import io
import json

import pytest

from prescope.tuning import Choices, Range, Space, open_sweep
from tests.support.sweep_runners import Hill

optuna_dashboard = pytest.importorskip("optuna_dashboard", reason="comes with the extra dev")


def asked(app, path):
    """What the dashboard's server answers its own page."""
    said = []
    environ = {
        "REQUEST_METHOD": "GET", "PATH_INFO": path, "SERVER_NAME": "here", "SERVER_PORT": "80", "QUERY_STRING": "",
        "wsgi.input": io.BytesIO(), "wsgi.errors": io.StringIO(), "wsgi.url_scheme": "http",
    }  # fmt: skip
    body = b"".join(app(environ, lambda status, headers, error=None: said.append(status)))
    assert said == ["200 OK"], (said, body)
    return json.loads(body)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:optuna_dashboard.*")
@pytest.mark.parametrize("objectives", [("tokens_per_s",), ("tokens_per_s", "gpu_bytes")])
def test_the_dashboard_shows_points_settings_and_attributes(tmp_path, objectives):
    space = Space(slots=Range(1, 40), schedule=Choices("slow", "fast"))
    url = f"sqlite:///{tmp_path / 'a.db'}"
    sweep = open_sweep("shown", space, Hill(), method="random", objectives=objectives, storage=url)
    sweep.run(points=25)
    app = optuna_dashboard.wsgi(url)
    (summary,) = asked(app, "/api/studies")["study_summaries"]
    assert summary["study_name"] == "shown"
    study = asked(app, f"/api/studies/{summary['study_id']}")
    assert len(study["trials"]) == 25
    assert study["objective_names"] == list(objectives)
    points = sweep.points()
    states = {"finished": "Complete", "infeasible": "Pruned"}
    for trial, point in zip(study["trials"], points.to_dict("records"), strict=True):
        params = {one["name"]: one["param_external_value"] for one in trial["params"]}
        told = {one["key"]: one["value"] for one in trial["user_attrs"]}
        assert trial["number"] == point["number"] and trial["state"] == states[point["state"]]
        assert (params["slots"], params["schedule"]) == (str(point["slots"]), point["schedule"])
        assert told["seed"] == str(point["seed"]) and "commit" in told
        if trial["state"] == "Complete":
            assert trial["values"] == [point[name] for name in objectives]
            assert {"seconds", "origin", "machine"} <= told.keys()
        else:
            assert "SlotPoolTooSmall" in told["reason"]
