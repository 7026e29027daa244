//! The public face of the library: every item that a user can name is a line in `public_face.txt`,
//! so that a change of the face shows in review.
//!
//! After an intended change: `QLORA_UPDATE_FACE=1 cargo test --test public_face`.
//!
//! The sources are parsed, not compiled. Each item is listed by its shortest public path, with
//! types as its signature writes them. Left out are implementations of traits, macros and what they
//! expand to, `#[doc(hidden)]` items and items of features.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;
use std::{env, fs};

use quote::ToTokens;
use syn::punctuated::Punctuated;
use syn::{
    Attribute, Fields, ImplItem, Item, ItemImpl, Meta, Path as SynPath, Signature, Token, TraitItem, Type, UseTree,
    Visibility,
};

/// A path of modules from the crate's root, and of an item within them.
type Names = Vec<String>;

#[derive(Default)]
struct Module {
    items: Vec<Named>,
    imports: Vec<Import>,
    impls: Vec<ItemImpl>,
}

struct Named {
    name: String,
    public: bool,
    item: Item,
}

struct Import {
    public: bool,
    path: Names,
    /// The name in this module, or `None` for a glob.
    name: Option<String>,
}

/// Target of a path.
#[derive(Clone)]
enum Target {
    Module(Names),
    /// A module, and the index of an item of it.
    Item(Names, usize),
    /// An item of another crate.
    Foreign(Names),
}

/// The modules of a crate, by their paths.
struct Sources(BTreeMap<Names, Module>);

impl Sources {
    /// Reads the crate whose root is `lib.rs` in the folder `src`.
    fn read(src: &Path) -> Self {
        let mut sources = Self(BTreeMap::new());
        sources.read_file(src, &src.join("lib.rs"), vec![]);
        sources
    }

    fn read_file(&mut self, src: &Path, file: &Path, path: Names) {
        let text = fs::read_to_string(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        let parsed = syn::parse_file(&text).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        self.read_items(src, parsed.items, path);
    }

    fn read_items(&mut self, src: &Path, items: Vec<Item>, path: Names) {
        let mut module = Module::default();
        for item in items {
            let Some((attrs, visibility, name)) = parts(&item) else { continue };
            if is_left_out(attrs) {
                continue;
            }
            let public = matches!(visibility, Some(Visibility::Public(_)));
            match item {
                Item::Use(item) => read_use(&item.tree, public, &mut vec![], &mut module.imports),
                Item::Impl(item) => module.impls.push(item),
                Item::Mod(mut item) => {
                    let inner = joined(&path, &name);
                    match item.content.take() {
                        Some((_, items)) => self.read_items(src, items, inner),
                        None => {
                            let stem = src.join(inner.join("/"));
                            let file = stem.with_extension("rs");
                            let file = if file.exists() { file } else { stem.join("mod.rs") };
                            self.read_file(src, &file, inner);
                        }
                    }
                    module.items.push(Named { name, public, item: Item::Mod(item) });
                }
                item => module.items.push(Named { name, public, item }),
            }
        }
        self.0.insert(path, module);
    }

    /// Resolves `path`, written in the module `from`: a module and a function may share a name.
    /// Nothing for other crates. `depth` bounds imports that are looked up for imports.
    fn resolve(&self, from: &[String], path: &[String], depth: usize) -> Vec<Target> {
        let Some((first, rest)) = path.split_first() else { return vec![Target::Module(from.to_vec())] };
        match first.as_str() {
            "crate" => return self.resolve(&[], rest, depth),
            "self" => return self.resolve(from, rest, depth),
            "super" => return self.resolve(&from[..from.len() - 1], rest, depth),
            _ => {}
        }
        let mut found = Vec::new();
        for target in self.lookup(from, first, depth) {
            match target {
                Target::Module(module) if !rest.is_empty() => found.extend(self.resolve(&module, rest, depth)),
                target if rest.is_empty() => found.push(target),
                _ => {}
            }
        }
        found
    }

    /// Resolves `name` in the module `at`: its own items, or what it imports.
    fn lookup(&self, at: &[String], name: &str, depth: usize) -> Vec<Target> {
        let module = &self.0[at];
        let mut found: Vec<_> =
            (0..module.items.len()).filter(|&i| module.items[i].name == name).map(|i| self.target(at, i)).collect();
        for import in module.imports.iter().filter(|_| depth > 0) {
            let mut path = import.path.clone();
            match &import.name {
                Some(imported) if imported == name => {}
                Some(_) => continue,
                None => path.push(name.to_string()),
            }
            found.extend(self.resolve(at, &path, depth - 1));
        }
        found
    }

    fn target(&self, module: &[String], index: usize) -> Target {
        let Named { name, item, .. } = &self.0[module].items[index];
        match item {
            Item::Mod(_) => Target::Module(joined(module, name)),
            _ => Target::Item(module.to_vec(), index),
        }
    }

    /// Public items of the module `at`, with names.
    fn exports(&self, at: &[String]) -> Vec<(String, Target)> {
        let module = &self.0[at];
        let own = module.items.iter().enumerate().filter(|(_, named)| named.public);
        let mut found: Vec<_> = own.map(|(i, named)| (named.name.clone(), self.target(at, i))).collect();
        for import in module.imports.iter().filter(|import| import.public) {
            let targets = self.resolve(at, &import.path, 4);
            match &import.name {
                Some(name) if targets.is_empty() => found.push((name.clone(), Target::Foreign(import.path.clone()))),
                Some(name) => found.extend(targets.into_iter().map(|target| (name.clone(), target))),
                None => found.extend(targets.iter().flat_map(|target| match target {
                    Target::Module(module) => self.exports(module),
                    _ => vec![],
                })),
            }
        }
        found
    }

    /// The face: a line for each item, sorted by path.
    fn face(&self) -> Vec<String> {
        let mut lines = BTreeSet::new();
        let mut public = BTreeMap::new();
        let mut queue = VecDeque::from([(vec![], vec![])]);
        let mut seen = BTreeSet::from([vec![]]);
        while let Some((path, module)) = queue.pop_front() {
            for (name, target) in self.exports(&module) {
                let path = joined(&path, &name);
                match target {
                    Target::Module(module) if seen.insert(module.clone()) => queue.push_back((path, module)),
                    Target::Module(_) => {}
                    Target::Item(module, index) => {
                        public.entry((module, index)).or_insert_with(|| path.join("::"));
                    }
                    Target::Foreign(original) => {
                        let path = path.join("::");
                        lines.insert((path.clone(), format!("use {path} = {}", original.join("::"))));
                    }
                }
            }
        }
        for ((module, index), path) in &public {
            describe(path, &self.0[module].items[*index].item, &mut lines);
        }
        for (at, module) in &self.0 {
            for block in module.impls.iter().filter(|block| block.trait_.is_none()) {
                let Type::Path(of) = &*block.self_ty else { continue };
                for target in self.resolve(at, &names(&of.path), 4) {
                    let Target::Item(module, index) = target else { continue };
                    if let Some(path) = public.get(&(module, index)) {
                        describe_impl(path, block, &mut lines);
                    }
                }
            }
        }
        lines.into_iter().map(|(_, line)| line).collect()
    }
}

/// Attributes, visibility and name of an item; `None` for what isn't part of a face.
fn parts(item: &Item) -> Option<(&[Attribute], Option<&Visibility>, String)> {
    Some(match item {
        Item::Const(i) => (&i.attrs, Some(&i.vis), i.ident.to_string()),
        Item::Enum(i) => (&i.attrs, Some(&i.vis), i.ident.to_string()),
        Item::Fn(i) => (&i.attrs, Some(&i.vis), i.sig.ident.to_string()),
        Item::Impl(i) => (&i.attrs, None, String::new()),
        Item::Mod(i) => (&i.attrs, Some(&i.vis), i.ident.to_string()),
        Item::Static(i) => (&i.attrs, Some(&i.vis), i.ident.to_string()),
        Item::Struct(i) => (&i.attrs, Some(&i.vis), i.ident.to_string()),
        Item::Trait(i) => (&i.attrs, Some(&i.vis), i.ident.to_string()),
        Item::Type(i) => (&i.attrs, Some(&i.vis), i.ident.to_string()),
        Item::Use(i) => (&i.attrs, Some(&i.vis), String::new()),
        _ => return None,
    })
}

fn is_left_out(attrs: &[Attribute]) -> bool {
    attrs.iter().any(|attr| match &attr.meta {
        Meta::List(list) if list.path.is_ident("cfg") => !is_on(&list.parse_args().expect("a cfg")),
        Meta::List(list) if list.path.is_ident("doc") => list.tokens.to_string() == "hidden",
        _ => false,
    })
}

/// Whether a `cfg` holds, without tests and features, on some platform.
fn is_on(cfg: &Meta) -> bool {
    let inner = |list: &syn::MetaList| {
        let parsed = list.parse_args_with(Punctuated::<Meta, Token![,]>::parse_terminated);
        parsed.expect("a list of cfgs").into_iter()
    };
    match cfg {
        Meta::Path(path) => !path.is_ident("test"),
        Meta::NameValue(pair) => !pair.path.is_ident("feature"),
        Meta::List(list) if list.path.is_ident("all") => inner(list).all(|cfg| is_on(&cfg)),
        Meta::List(list) if list.path.is_ident("any") => inner(list).any(|cfg| is_on(&cfg)),
        Meta::List(list) => {
            let negated = inner(list).next().expect("not has one");
            matches!(&negated, Meta::NameValue(pair) if pair.path.is_ident("target_os")) || !is_on(&negated)
        }
    }
}

fn read_use(tree: &UseTree, public: bool, prefix: &mut Names, imports: &mut Vec<Import>) {
    let mut add = |mut path: Names, last: Option<String>, name: Option<String>| {
        path.extend(last.filter(|last| last != "self"));
        imports.push(Import { public, path, name });
    };
    match tree {
        UseTree::Path(tree) => {
            prefix.push(tree.ident.to_string());
            read_use(&tree.tree, public, prefix, imports);
            prefix.pop();
        }
        UseTree::Name(tree) if tree.ident == "self" => add(prefix.clone(), None, prefix.last().cloned()),
        UseTree::Name(tree) => add(prefix.clone(), Some(tree.ident.to_string()), Some(tree.ident.to_string())),
        UseTree::Rename(tree) => add(prefix.clone(), Some(tree.ident.to_string()), Some(tree.rename.to_string())),
        UseTree::Glob(_) => add(prefix.clone(), None, None),
        UseTree::Group(tree) => tree.items.iter().for_each(|tree| read_use(tree, public, prefix, imports)),
    }
}

/// Adds the lines of an item by the name `path`, without its impl blocks.
fn describe(path: &str, item: &Item, lines: &mut BTreeSet<(String, String)>) {
    let mut add = |path: String, line: String| {
        lines.insert((path, line));
    };
    match item {
        Item::Const(i) => add(path.into(), format!("const {path}: {}", text(&i.ty))),
        Item::Static(i) => add(path.into(), format!("static {path}: {}", text(&i.ty))),
        Item::Fn(i) => add(path.into(), signature(path, &i.sig)),
        Item::Type(i) => add(path.into(), format!("type {path}{} = {}", text(&i.generics), text(&i.ty))),
        Item::Struct(i) => {
            add(path.into(), format!("struct {path}{}", text(&i.generics)));
            for (index, field) in i.fields.iter().enumerate() {
                if matches!(field.vis, Visibility::Public(_)) && !is_left_out(&field.attrs) {
                    let name = field.ident.as_ref().map_or(index.to_string(), ToString::to_string);
                    let field_path = format!("{path}.{name}");
                    add(field_path.clone(), format!("field {field_path}: {}", text(&field.ty)));
                }
            }
        }
        Item::Enum(i) => {
            add(path.into(), format!("enum {path}{}", text(&i.generics)));
            for variant in &i.variants {
                let variant_path = format!("{path}::{}", variant.ident);
                let fields: Vec<_> = variant
                    .fields
                    .iter()
                    .map(|field| match &field.ident {
                        Some(name) => format!("{name}: {}", text(&field.ty)),
                        None => text(&field.ty),
                    })
                    .collect();
                let fields = match variant.fields {
                    Fields::Named(_) => format!(" {{ {} }}", fields.join(", ")),
                    Fields::Unnamed(_) => format!("({})", fields.join(", ")),
                    Fields::Unit => String::new(),
                };
                add(variant_path.clone(), format!("variant {variant_path}{fields}"));
            }
        }
        Item::Trait(i) => {
            let bounds = if i.supertraits.is_empty() { String::new() } else { format!(": {}", text(&i.supertraits)) };
            add(path.into(), format!("trait {path}{}{bounds}", text(&i.generics)));
            for item in &i.items {
                if let TraitItem::Fn(item) = item {
                    let path = format!("{path}::{}", item.sig.ident);
                    add(path.clone(), signature(&path, &item.sig));
                }
            }
        }
        _ => {}
    }
}

/// Adds the public functions and constants of an impl block of the type with the name `path`.
fn describe_impl(path: &str, block: &ItemImpl, lines: &mut BTreeSet<(String, String)>) {
    for item in &block.items {
        let (attrs, visibility, name) = match item {
            ImplItem::Const(i) => (&i.attrs, &i.vis, &i.ident),
            ImplItem::Fn(i) => (&i.attrs, &i.vis, &i.sig.ident),
            _ => continue,
        };
        if !matches!(visibility, Visibility::Public(_)) || is_left_out(attrs) {
            continue;
        }
        let path = format!("{path}::{name}");
        let line = match item {
            ImplItem::Const(i) => format!("const {path}: {}", text(&i.ty)),
            ImplItem::Fn(i) => signature(&path, &i.sig),
            _ => continue,
        };
        lines.insert((path, line));
    }
}

fn signature(path: &str, signature: &Signature) -> String {
    text(signature).replacen(&format!("fn {}", signature.ident), &format!("fn {path}"), 1)
}

/// Tokens as `rustfmt` would space them, nearly.
fn text(tokens: &impl ToTokens) -> String {
    let mut text = tokens.to_token_stream().to_string();
    for (from, to) in [
        (" :: ", "::"),
        (":: ", "::"),
        (" ::", "::"),
        (" <", "<"),
        ("< ", "<"),
        (" >", ">"),
        ("& ", "&"),
        ("? ", "?"),
        (" ,", ","),
        (" ;", ";"),
        (" :", ":"),
        (" (", "("),
        ("->(", "-> ("),
        (",(", ", ("),
        (":(", ": ("),
        ("=(", "= ("),
        (",)", ")"),
        (",>", ">"),
    ] {
        text = text.replace(from, to);
    }
    text
}

fn names(path: &SynPath) -> Names {
    path.segments.iter().map(|segment| segment.ident.to_string()).collect()
}

fn joined(path: &[String], name: &str) -> Names {
    [path, &[name.to_string()]].concat()
}

#[test]
fn the_public_face_is_as_listed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let face = Sources::read(&root.join("src")).face();
    let listing = root.join("tests/public_face.txt");
    if env::var_os("QLORA_UPDATE_FACE").is_some_and(|value| value == "1") {
        fs::write(&listing, face.join("\n") + "\n").expect("the listing is written");
        return;
    }
    let listed = fs::read_to_string(&listing).expect("tests/public_face.txt");
    let (listed, face): (BTreeSet<&str>, BTreeSet<&str>) =
        (listed.lines().collect(), face.iter().map(|l| &**l).collect());
    let gone = listed.difference(&face).map(|line| format!("- {line}\n"));
    let new = face.difference(&listed).map(|line| format!("+ {line}\n"));
    let changes: String = gone.chain(new).collect();
    assert!(
        changes.is_empty(),
        "the public face changed:\n{changes}If that is meant: QLORA_UPDATE_FACE=1 cargo test --test public_face"
    );
}
