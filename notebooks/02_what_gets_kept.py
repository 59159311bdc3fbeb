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
# # What gets kept: the storms of 2013
#
# Four winter storms are labelled in this set. Does a memory that knows nothing of the labels keep those hours? Which
# router finds them, and is what it kept worth anything? Keeping is not the same as helping, so both are measured.

# %%
import pandas as pd
from shared import STORM_EVENING, fitted

import hamts
from hamts.plot import plot_channels, plot_usage
from hamts.routes import inside_share, judge_worth, overlap_by_reason, tagged_not_kept, worth_by_reason, worth_nothing

data = hamts.load_dataset("nycflights13")
data.labels.drop_duplicates("start")[["start", "end", "label"]]

# %% [markdown]
# ## By score alone
#
# This model never saw the tag. Three routers share the budget: the surprise of the paper, innovation, a learned mix.
# `chance` is what the same number of kept stretches would meet if each item's were shifted along the year at random; a
# `score` of 0 is chance, 1 is perfect, below 0 is worse than chance.

# %%
blind = fitted("flights_scores")
df = data.df.drop(columns="winter_storm")
kept = blind.routes(df)
ever = ("kept", "evicted", "quota_full")
shown = ["reason", "kept_steps", "precision", "recall", "chance", "chance_low", "chance_high", "score"]
overlap_by_reason(kept, data.labels, seed=0, statuses=ever)[shown].round(3)

# %% [markdown]
# ## By tag
#
# The second model was given the storms as an event column. What a tag asks for (reason `event`) lies inside by
# construction; look at what its learned score does beside it.

# %%
told = fitted("flights")
tagged = told.routes(data.df)
overlap_by_reason(tagged, data.labels, seed=0, statuses=ever)[shown].round(3)

# %%
tagged_not_kept(tagged).head()

# %% [markdown]
# ## What the storm hours are worth
#
# At seven evenings of December, all kept steps of a reason that lie in a storm are dropped at once, and the next day is
# forecast again. `worth` is the rise of the quantile loss, in units of the stream's scale; `random` is the same for as
# many random other entries. Only a worth above `random_high` says that these hours mattered more than any others.

# %%
evenings = [STORM_EVENING + pd.Timedelta(days=days) for days in range(7)]
storm = kept[(kept["status"] == "kept") & (inside_share(kept, data.labels) > 0)]
worth = ["reason", "entries", "worth", "random", "random_low", "random_high", "words"]
worth_by_reason(blind, df, storm, cutoffs=evenings)[worth] if len(storm) else "no kept step lies in a storm"

# %%
storm = tagged[(tagged["status"] == "kept") & (inside_share(tagged, data.labels) > 0)]
worth_by_reason(told, data.df, storm, cutoffs=evenings)[worth]

# %% [markdown]
# ## Which hours, and why
#
# The table can be counted by hour, weekday, column, tag, layer or reason.

# %%
told.routes(data.df, by="channel")[["channel", "tokens", "kept", "kept_share", "evicted", "quota_full"]]

# %%
ewr = data.df[data.df["unique_id"] == "EWR"]
axes = plot_channels(ewr, tagged, item="EWR", start="2013-11-15")

# %%
axes = plot_usage(tagged, item="EWR")

# %% [markdown]
# ## One by one
#
# On the evening of the storm of 14 December: what is each of the entries worth that asked most to be kept? Expect many
# to be worth nothing; that is what a budget is for.

# %%
evening = told.routes(data.df, at=STORM_EVENING, worth=20)
judge_worth(evening).value_counts()

# %%
columns = ["unique_id", "channel", "ds_start", "reason", "worth", "worth_random_low", "worth_random_high"]
evening.sort_values("worth", ascending=False)[columns].head(5)

# %%
len(worth_nothing(evening))
