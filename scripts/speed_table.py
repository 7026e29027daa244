"""Files of `qlora bench --output` as the tables of docs/performance.md, in Markdown: what each program takes for a case, and how that is to ours."""

import json
import sys


def duration(ms):
    value, unit = (ms / 1e3, "s") if ms >= 999.5 else (ms, "ms")
    return f"{value:#.3g}".rstrip(".") + f" {unit}"


def case(row):
    if row["op"] == "step":
        return f"step of {row['tokens']} tokens"
    return f"{row['op']}, M = {row['m']}"


def peer(time):
    return f"{duration(time['ms_median'])}, {time['ratio']:.2f} x" if "ratio" in time else "-"


def table(report):
    rows, machine = report["rows"], report["machine"]
    tier = [f"tier {rows[0]['tier']}"] if rows[0]["tier"] else []
    where = [machine["cpu"], f"{machine['cores']} cores", machine["os"], f"at a load of {machine['load']:.1f}"]
    yield ", ".join([report["device"], report["driver"], *tier, *where, report["date"][:10]]) + ":"
    yield ""
    names = ["", f"qlora {report['version']}", *(time["name"] for time in rows[0].get("peers", []))]
    yield f"| {' | '.join(names)} |"
    yield "|" + "---|" * len(names)
    for row in rows:
        cells = [case(row), duration(row["ms_median"]), *(peer(time) for time in row.get("peers", []))]
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    for path in sys.argv[1:]:
        with open(path) as file:
            print("\n".join(table(json.load(file))) + "\n")
