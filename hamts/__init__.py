"""hamts: forecasting with a memory that its user can see and set."""
