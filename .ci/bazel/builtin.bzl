"""Repositories that Bazel 4 wants to download, from what is built into it."""

def _builtin_rules(repository):
    repository.file(
        "BUILD",
        "package(default_visibility = [\"//visibility:public\"])\n" +
        repository.attr.build,
    )
    if repository.attr.package:
        folder = repository.attr.package
        repository.file(folder + "/BUILD")
        repository.file(
            folder + "/defs.bzl",
            "\n".join([
                "{0} = native.{0}".format(rule)
                for rule in repository.attr.rules
            ]) + "\n" + repository.attr.definitions,
        )

builtin_rules = repository_rule(
    implementation = _builtin_rules,
    attrs = {
        "build": attr.string(doc = "Targets of the repository itself."),
        "definitions": attr.string(doc = "What defs.bzl has beside rules."),
        "package": attr.string(doc = "Folder of the file defs.bzl."),
        "rules": attr.string_list(doc = "Built-in rules that defs.bzl names."),
    },
)
