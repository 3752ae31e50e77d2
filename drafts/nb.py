"""Helpers to edit a notebook: load, find by text, replace, insert, save."""
import sys
sys.path.insert(0,'.')
import nbformat
class NB:
    def __init__(self,path): self.path=path; self.nb=nbformat.read(path,4)
    def find(self,text,kind=None):
        hits=[i for i,c in enumerate(self.nb.cells) if text in c.source and (kind is None or c.cell_type==kind)]
        assert len(hits)==1,(text,hits); return hits[0]
    def set(self,text,source,kind=None):
        i=self.find(text,kind); self.nb.cells[i].source=source.strip('\n'); return i
    def sub(self,old,new,count=1):
        hits=[c for c in self.nb.cells if old in c.source]
        assert len(hits)==count and all(c.source.count(old)==1 for c in hits),(old,len(hits))
        for c in hits: c.source=c.source.replace(old,new)
    def insert(self,i,kind,source,tags=()):
        c=nbformat.v4.new_code_cell(source.strip('\n')) if kind=='code' else nbformat.v4.new_markdown_cell(source.strip('\n'))
        if tags: c.metadata['tags']=list(tags)
        self.nb.cells.insert(i,c)
    def after(self,text,kind,source): i=self.find(text); self.insert(i+1,kind,source); return i+1
    def drop(self,text): del self.nb.cells[self.find(text)]
    def save(self): nbformat.write(self.nb,self.path)
