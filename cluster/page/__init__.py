"""The playground as one HTML file that plays recorded answers: no service, no network and no installation.

Building needs the standard library only; recording needs a service. `recordings` holds what was recorded, `browser`
the scripts and the style that the page has beside those of `router/playground`.
"""
