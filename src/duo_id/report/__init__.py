"""`python -m duo_id.report`: tables, figures and a page of what runs have found."""
