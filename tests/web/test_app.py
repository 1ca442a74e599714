"""What the page's server answers, and whom."""

from __future__ import annotations

import datetime as dt
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from source_tree import RunScript
from web_workspaces import HOSTILE, write_many, write_record, write_sample

from stocklora.forecaster.batches import CPU_TOKENS
from stocklora.web.app import make_app
from stocklora.web.runs import Runs
from stocklora.web.workspace import Workspace

PORT, TOKEN = 8750, "a-token-of-this-life"
ORIGIN = f"http://127.0.0.1:{PORT}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def client_of(root: Path, **options: object) -> TestClient:
    app = make_app(Workspace(root, root.parent / "models"), TOKEN, PORT)
    return TestClient(app, base_url=ORIGIN, headers={"Origin": ORIGIN}, raise_server_exceptions=False, **options)


@pytest.fixture
def page(root: Path) -> TestClient:
    """A browser that has opened the printed address."""
    client = client_of(root)
    assert client.get("/", params={"token": TOKEN}).status_code == 200
    return client


def watched(page: TestClient) -> dict:
    """The watch list, once everything is read."""
    for _ in range(200):
        found = page.get("/api/watch").json()
        if not found["reading"]:
            return found
    raise AssertionError("prices are still being read")


# ------------------------------------------------------------------------------------------------------ who may ask


def test_the_address_gives_a_cookie_and_the_cookie_opens_the_rest(root: Path) -> None:
    client = client_of(root)
    assert client.get("/api/state").status_code == 403
    answer = client.get("/", params={"token": TOKEN})
    cookie = answer.headers["set-cookie"]
    assert f"stocklora_{PORT}={TOKEN}" in cookie
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert client.get("/api/state").status_code == 200


@pytest.mark.parametrize("path", ["/", "/api/state", "/static/js/app.js", "/files/predictions.csv", "/no/such"])
@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN[:-1], TOKEN + "x"])
def test_without_the_token_nothing_is_answered(root: Path, path: str, token: str | None) -> None:
    answer = client_of(root).get(path, params={} if token is None else {"token": token})
    assert answer.status_code == 403
    assert "set-cookie" not in answer.headers


def test_the_token_in_another_address_than_the_page_s_opens_nothing(root: Path) -> None:
    assert client_of(root).get("/api/state", params={"token": TOKEN}).status_code == 403


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", f"evil.example:{PORT}", "[::1]:8750", ""])
def test_another_host_is_refused(page: TestClient, host: str) -> None:
    assert page.get("/api/state", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:9999", "https://127.0.0.1:8750"])
def test_another_origin_is_refused(page: TestClient, origin: str) -> None:
    assert page.get("/api/state", headers={"Origin": origin}).status_code == 403
    assert page.post("/api/runs", json={"script": "train"}, headers={"Origin": origin}).status_code == 403


def test_what_changes_something_must_say_its_origin(page: TestClient) -> None:
    del page.headers["Origin"]
    assert page.get("/api/state").status_code == 200
    assert page.post("/api/forms/train/check", json={}).status_code == 403


def test_every_answer_forbids_foreign_scripts(page: TestClient) -> None:
    for path in ("/", "/api/state", "/static/js/app.js", "/nowhere"):
        headers = page.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
    text = page.get("/").text
    assert not re.search(r"<script(?![^>]* src=)|\son\w+=|style=", text)


def test_the_package_s_files_name_no_other_host() -> None:
    static = Path(__file__).parents[2] / "stocklora" / "web" / "static"
    for path in [*static.glob("*"), *static.glob("js/*")]:
        if path.is_file():
            found = set(re.findall(r"https?://[^\s\"'`)]+", path.read_text(encoding="utf-8")))
            assert found <= {"https://www.tradingview.com/", "http://www.w3.org/2000/svg"}, path
            assert "innerHTML" not in path.read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ files


def test_only_files_of_the_workspace_are_shown(page: TestClient, root: Path) -> None:
    (root.parent / "secret.txt").write_text("secret")
    (root / "link.txt").symlink_to(root.parent / "secret.txt")
    (root / "linked").symlink_to(root.parent, target_is_directory=True)
    (root / ".hidden").write_text("hidden")
    (root / "seen.txt").write_text("seen")
    for name in ("../secret.txt", "%2e%2e/secret.txt", "..%2fsecret.txt", "link.txt", "linked/secret.txt", ".hidden",
                 str(root.parent / "secret.txt"), "/etc/passwd", "", "."):  # fmt: skip
        answer = page.get(f"/files/{name}")
        assert answer.status_code in (400, 404), name
        assert "secret" not in answer.text or "outside" in answer.text or "no file" in answer.text
        assert page.get("/api/file", params={"name": name}).status_code == 400
    answer = page.get("/files/seen.txt")
    assert answer.text == "seen"
    assert answer.headers["content-disposition"].startswith("attachment")


def test_a_report_runs_no_script_and_has_no_origin(page: TestClient, root: Path) -> None:
    (root / "report.html").write_text("<script>1</script>")
    policy = page.get("/files/report.html").headers["content-security-policy"]
    assert policy.startswith("sandbox;")
    assert "allow-scripts" not in policy
    assert "script-src" not in policy
    assert "default-src 'none'" in policy


GOOD = "Date,Open,High,Low,Close,Volume\n" + "".join(f"2024-01-{d:02},10,11,9,{10 + d / 10},5\n" for d in (2, 3, 4, 5))


def test_a_dropped_file_becomes_a_line_of_the_list(page: TestClient, root: Path) -> None:
    added = page.post("/api/prices", params={"name": "../../XYZ.csv"}, content=GOOD)
    assert added.json() == {"tickers": ["XYZ"]}
    assert [path.name for path in (root / "prices").iterdir()] == ["XYZ.csv"]
    (line,) = watched(page)["lines"]
    assert (line["ticker"], line["close"], line["last"], line["rows"]) == ("XYZ", 10.5, "2024-01-05", 4)
    assert line["change"] == pytest.approx(10.5 / 10.4 - 1, abs=1e-5)
    again = page.post(
        "/api/prices",
        params={"name": "other.csv"},
        content="Ticker," + GOOD.replace("\n", "\nXYZ,").removesuffix("XYZ,"),
    )
    assert again.status_code == 400
    assert "is in prices/XYZ.csv already" in again.json()["error"]
    assert page.post("/api/prices/remove", json={"name": "prices/XYZ.csv"}).status_code == 200
    assert watched(page)["lines"] == []
    assert (root / "removed" / "XYZ.csv").read_text() == GOOD


@pytest.mark.parametrize(("name", "content"), [("bad.csv", "Date,Close\n2024-01-02,x\n"), ("none.csv", ""),
                                               ("binary.csv", "\x00\x01\x02")])  # fmt: skip
def test_what_is_no_price_table_leaves_nothing(page: TestClient, root: Path, name: str, content: str) -> None:
    answer = page.post("/api/prices", params={"name": name}, content=content)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(name)
    assert not list(root.rglob("*.csv"))


@pytest.mark.parametrize("name", ["", ".hidden.csv", "..", "a/", "-x.csv", "x" * 300])
def test_a_name_that_is_none(page: TestClient, name: str) -> None:
    assert "no name for a file" in page.post("/api/prices", params={"name": name}, content=GOOD).json()["error"]


def test_a_broken_file_in_the_folder_is_named_and_the_others_stand(page: TestClient, root: Path) -> None:
    write_sample(root, "AAPL")
    (root / "prices" / "bad.csv").write_text("Date,Open,High,Low,Close,Volume\n2024-01-02,1,2,3\n")
    found = watched(page)
    assert [line["ticker"] for line in found["lines"]] == ["AAPL"]
    assert list(found["errors"]) == ["prices/bad.csv"]
    assert str(root) not in found["errors"]["prices/bad.csv"]


def test_a_ticker_that_would_be_code_is_text(page: TestClient) -> None:
    page.post("/api/prices", params={"name": "x.csv"}, content="Ticker," + "\n".join(
        (f'"{HOSTILE}",' if at else "") + line for at, line in enumerate(GOOD.strip().splitlines())))  # fmt: skip
    answer = page.get("/api/watch")
    assert answer.headers["content-type"] == "application/json"
    assert {line["ticker"] for line in watched(page)["lines"]} <= {HOSTILE}


# -------------------------------------------------------------------------------------------------------- forecasts


def test_forecast_reasons_and_probabilities_are_the_scripts(
    page: TestClient, root: Path, call_script: RunScript
) -> None:
    prices = write_sample(root, "AAPL")
    arguments = watched(page)["arguments"]
    assert arguments == ["prices/AAPL.csv"]
    result = call_script(
        "framework.py", "--model_path", "prior", "--test_csv", *arguments, "--explain", "--above", "58", cwd=root
    )
    (line,) = watched(page)["lines"]
    assert [row["day"] for row in line["forecast"]] == [1, 2, 3]
    found = page.get("/api/ticker", params={"name": "AAPL", "days": 20}).json()
    assert found["bars"][-1][4] == pytest.approx(prices["AAPL"]["Close"].iloc[-1], rel=1e-6)
    assert len(found["bars"]) == 20
    why = found["why"]
    product = why["level"] * np.prod([1 + factor["percent"] / 100 for factor in why["factors"]])
    assert product == pytest.approx(why["scale"], rel=1e-9)
    paths = np.array(page.get("/api/paths", params={"name": "AAPL"}).json()["closes"])
    assert paths.shape == (4000, 3)
    said = re.search(r"closes above 58: \S+ (\d+)%, \S+ (\d+)%, \S+ (\d+)%; .* (\d+)%", result.stdout)
    assert said is not None, result.stdout
    shares = [*(paths > 58).mean(axis=0), (paths > 58).any(axis=1).mean()]
    assert [f"{100 * share:.0f}" for share in shares] == list(said.groups())


def test_hit_rates_and_alerts_are_the_ledger_s(page: TestClient, root: Path) -> None:
    prices = write_sample(root, "AAPL", "MSFT")
    write_record(root, prices, origins=30)
    watched(page)
    record = page.get("/api/record").json()
    assert record["entries"] == 60
    for ticker, frame in prices.items():
        closes = frame["Close"].to_numpy()
        first, last = len(closes) - 4 - 29, len(closes) - 4
        inside = [abs(np.log(closes[at + 1] / closes[at])) <= 1.2816 * 0.016 for at in range(first, last + 1)]
        assert (record["tickers"][ticker]["inside"], record["tickers"][ticker]["of"]) == (sum(inside), 30)
        assert (record["tickers"][ticker]["alert"] is None) == inside[-1]
    (forecaster,) = record["forecasters"]
    assert forecaster["states"] == {"scored": 180}
    assert [day["day"] for day in forecaster["days"]] == [1, 2, 3]


def test_a_record_that_was_changed_is_said_to_be_broken(page: TestClient, root: Path) -> None:
    import sqlite3

    write_record(root, write_sample(root, "AAPL"), origins=3)
    database = sqlite3.connect(root / "forecasts.db")
    database.execute("DROP TRIGGER entries_stay")
    database.execute("UPDATE entries SET content = replace(content, 'AAPL', 'MSFT') WHERE number = 2")
    database.commit()
    assert "entry 2" in page.get("/api/record").json()["error"]


def test_thousands_of_tickers_are_there_again_at_once(root: Path) -> None:
    tickers = write_many(root, 300, rows=20)
    first = client_of(root)
    first.get("/", params={"token": TOKEN})
    assert [line["ticker"] for line in watched(first)["lines"]] == tickers
    kept = root / ".stocklora" / "watch.json"
    for _ in range(100):
        if kept.exists():
            break
        time.sleep(0.05)
    second = client_of(root)
    second.get("/", params={"token": TOKEN})
    found = second.get("/api/watch").json()  # of what the first kept
    assert found["reading"] == 0
    assert len(found["lines"]) == 300
    assert len(found["lines"][7]["forecast"]) == 3


# ---------------------------------------------------------------------------------------------- data, runs, assistant


def test_what_is_in_a_file_and_what_is_odd_about_it(page: TestClient, root: Path) -> None:
    write_sample(root, "AAPL")
    text = (root / "prices" / "AAPL.csv").read_text().splitlines()
    (root / "prices" / "GAP.csv").write_text("\n".join([*text[:100], *text[110:]]) + "\n")
    (root / "rows.jsonl").write_text(
        '{"instruction": "<b>问</b>", "output": "答"}\n{"instruction": "", "output": ""}\n', encoding="utf-8"
    )
    kinds = {file["name"]: file["kind"] for file in page.get("/api/state").json()["files"]}
    assert kinds == {"prices/AAPL.csv": "prices", "prices/GAP.csv": "prices", "rows.jsonl": "rows"}
    gap = page.get("/api/file", params={"name": "prices/GAP.csv"}).json()
    missing = [finding for finding in gap["tickers"][0]["findings"] if finding["kind"].startswith("missing sessions")]
    assert missing[0]["count"] == 10
    rows = page.get("/api/file", params={"name": "rows.jsonl"}).json()
    assert (rows["count"], rows["bad_rows"]) == (1, 1)
    assert rows["faults"][0]["row"] == 2
    assert rows["examples"][0]["turns"][0]["text"] == "<b>问</b>"


def test_a_form_s_command_is_checked_as_one_types(page: TestClient, root: Path) -> None:
    command = page.post("/api/forms/train/check", json={"epochs": 5, "data": ["prices"]}).json()["command"]
    assert command.splitlines()[0] == f"cd {root}"
    assert command.endswith("train.py --data prices --epochs 5")
    refused = page.post("/api/forms/train/check", json={"epochs": -5})
    assert refused.status_code == 400
    assert "--epochs must be 0 or more" in refused.json()["error"]
    assert page.post("/api/runs", json={"script": "../evil", "values": {}}).status_code == 400
    assert page.post("/api/runs", content="[1]").status_code == 400
    assert page.get("/api/runs").json() == []


def test_a_log_has_its_last_lines_no_later_than_its_run_is_over(
    page: TestClient, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run writes its last line and ends while it is asked about."""
    folder = root / "runs" / "20260101-000000-train-abcdef"
    folder.mkdir(parents=True)
    command = {"script": "train", "values": {}, "argv": ["python", "train.py"], "folder": str(root),
               "started": dt.datetime.now(dt.UTC).isoformat()}  # fmt: skip
    (folder / "command.json").write_text(json.dumps(command))
    (folder / "log").write_text("first\nla")
    describe = Runs.describe

    def and_then_it_ends(runs: Runs, name: str) -> dict[str, Any]:
        described = describe(runs, name)
        (folder / "log").write_text("first\nlast\n")
        (folder / "exit.json").write_text(json.dumps({"code": 0, "ended": time.time()}))
        return described

    monkeypatch.setattr(Runs, "describe", and_then_it_ends)
    text, start, state = "", 0, "running"
    while state == "running":
        found = page.get(f"/api/runs/{folder.name}/log", params={"start": start}).json()
        text, start, state = text + found["text"], found["next"], found["run"]["state"]
    assert text == "first\nlast\n"


def test_the_memory_plan_is_the_training_s(page: TestClient, root: Path, tiny_model: Path) -> None:
    (root / "base").symlink_to(tiny_model)  # a link out of the workspace is no part of it
    assert "outside" in page.post("/api/plan", json={"model_path": "base"}).json()["error"]
    (root / "base").unlink()
    import shutil

    shutil.copytree(tiny_model, root / "base")
    assert page.get("/api/state").json()["base_models"] == ["base"]
    changes: list[dict[str, Any]] = [{"max_tokens_per_batch": 10**6}, {"max_tokens_per_batch": 10**6, "batch_size": 8},
                                     {"method": "full"}]  # fmt: skip
    plans = [page.post("/api/plan", json={"model_path": "base", **more}).json() for more in changes]
    assert plans[0]["total_mb"] == pytest.approx(sum(plans[0]["parts"].values()), abs=2)
    assert plans[1]["tokens"] == 2 * plans[0]["tokens"]
    assert plans[2]["tokens"] == CPU_TOKENS < plans[0]["tokens"]
    assert plans[2]["trainable"] >= plans[2]["parameters"]
    assert "--lora_rank must be above 0" in page.post("/api/plan", json={"lora_rank": -1}).json()["error"]
    page.app.state.planner.close()  # type: ignore[attr-defined]


def test_without_a_chat_server_the_assistant_says_so(page: TestClient) -> None:
    found = page.get("/api/assistant").json()
    assert found["server"] is None
    assert "sentiment" in found["schemas"]
    answer = page.post("/api/chat", json={"model": "base", "messages": [{"role": "user", "content": "hi"}]})
    assert "start one first" in answer.json()["error"]
    assert page.post("/api/chat", json={"model": 3}).status_code == 400
