"""Prediction of response and of time to an event from forecasts and clinical data; empty until that part is built."""
