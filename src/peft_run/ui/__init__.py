"""`peft ui`: the road as a web page. It reads run folders with the road's own functions and starts its commands.

app        the application: gate, languages, pages          gate       who may come in
workspace  which paths the page may name, and what is there  jobs       commands that outlive the page
command    short commands that are waited for               client     a running `peft serve`
layout     what all pages share                             pages/     one file a page
"""
