"""What a served checkpoint does: Prometheus metrics from the workers, and an endpoint that shows them.

recorder.py runs in the workers and writes files, collector.py reads them in the front-end; metrics.py names what
is in them. info.py and endpoint.py are the routes under /v1/d2moe.
"""
