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
# # Events and actions: pumps of a water network, faults of a plant
#
# A tag is a promise: what it marks is kept, whatever its score, as long as its quota lasts. An action is a control
# input: known ahead when it is planned, and something that can be asked about ("what if this pump had stayed off?").

# %%
from shared import PUMPS, fitted, plant, tanks

import hamts
from hamts.plot import plot_channels, plot_routes, plot_survival
from hamts.routes import inside_share, overlap_by_reason, tagged_not_kept, worth_by_reason

df = tanks()
model = fitted("tanks")
model

# %% [markdown]
# ## Switches are tags
#
# The steps at which a pump is switched ask to be kept (reason `action`). Pumps switch often, so the quota, half of the
# cap of the scratchpads, is soon full: look at how many were pushed out.

# %%
table = model.routes(df)
table.query("reason == 'action'").groupby(["unique_id", "status"]).size().unstack(fill_value=0)

# %%
tagged_not_kept(table)[["unique_id", "ds_start", "tag", "status", "channels"]].tail(3)

# %%
late = df[df["unique_id"] == "dataset04"]
axes = plot_channels(late, table, item="dataset04", channels=["L_T1", "L_T2", "L_T3"], start="2016-11-01")

# %% [markdown]
# How long does an entry live? What was kept by score stays, what a switch asked for is pushed out by later switches.

# %%
axes = plot_survival(table)

# %% [markdown]
# ## What if
#
# Two forecasts from one state: the pumps as they last were, and one of them switched. The difference is the model's
# answer, not a causal estimate; a model this small may hardly have learned what a pump does.

# %%
stream = model.stream(late)
last = late[PUMPS].iloc[-1]
other = stream.scenario({"S_PU2": 1 - float(last["S_PU2"])}, h=24)
other.df.groupby("target_name")[["planned", "changed", "difference"]].mean().round(3)

# %%
axes = other.df.pivot(index="ds", columns="target_name", values="difference").plot(figsize=(8, 2.4))
text = axes.set_ylabel("change of level")

# %% [markdown]
# ## Faults of a plant
#
# Seven runs with and without a fault; in the test runs it sets in at step 160 and stays. An alarm column is the tag: it
# marks when a sensor leaves four deviations. Which router keeps the two hours after the onset, against chance?

# %%
plant_df, plant_model = plant(), fitted("tep")
runs = plant_df[plant_df["unique_id"].str.endswith("_te")]
faults = hamts.load_dataset("tep").labels
faults = faults[faults["unique_id"].isin(runs["unique_id"])]
onsets = faults.assign(end=faults["start"] + 39)
kept = plant_model.routes(runs)
ever = ("kept", "evicted", "quota_full")
shown = ["reason", "kept_steps", "precision", "recall", "chance", "chance_low", "chance_high", "score"]
overlap_by_reason(kept, onsets, seed=0, statuses=ever)[shown].round(3)

# %% [markdown]
# The same for the whole time of the fault. It covers five sixths of a run, so chance is high.

# %%
overlap_by_reason(kept, faults, seed=0, statuses=ever)[shown].round(3)

# %%
item = faults["unique_id"].iloc[0]
above, below = plot_routes(runs, kept, "XMEAS_9", item=item, windows=onsets)

# %% [markdown]
# And what the kept onsets are worth to forecasts made 60 to 120 steps after them, against as many random entries.

# %%
onset = kept[(kept["status"] == "kept") & (inside_share(kept, onsets) > 0)]
worth = ["reason", "entries", "worth", "random", "random_low", "random_high", "words"]
worth_by_reason(plant_model, runs, onset, cutoffs=[260, 280, 300, 320])[worth]
