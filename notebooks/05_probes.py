# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Probes: what a memory must still know after a delay
#
# Average error hides forgetting. A probe plants something early, fills the time with decoys, and asks for it late; the
# memory has a fixed budget. Here is the tier without any training: the layer's own parts with keys and gates set by
# hand, so that what differs is what each router keeps.

# %%
import probes
from hamts.plot import plot_frontier

report = probes.run_probes(["der", "pbc"], tier="T0", preset="smoke", progress=False)
report

# %% [markdown]
# `nerr` is the error between the floor of guessing (1) and the oracle (0). Compare the routers at the same budget:
# random keeps as many steps, the oracle knows what will be asked. Lines such as `mix:threshold` keep to the budget by a
# level instead of a list of fixed length; they are left out here.

# %%
lists = report.frame[~report.frame["router"].str.contains(":")]
rows = lists.query("model in ('kv', 'state') and metric == 'nerr'")
rows.pivot_table(index=["rung", "router"], columns="budget_rows", values="value").round(2)

# %% [markdown]
# Was the planted step kept at all? `recall_corrected` is recall beyond chance: a router can only win by keeping it.

# %%
recall = lists.query("model == 'kv' and metric == 'recall_corrected'")
recall.pivot_table(index="router", columns="rung", values="value").round(2)

# %%
line = rows.query("rung == 'derD' and model == 'kv'").groupby(["router", "budget_rows"], as_index=False)["value"].mean()
axes = plot_frontier(line.rename(columns={"value": "nerr"}), x="budget_rows", y="nerr", group="router")
