"""Who judges responses: a toxicity classifier, truth judges, a pairwise judge behind an API."""
