"""`python -m duo_id.report`: the results of runs as tables, figures and an HTML page."""
